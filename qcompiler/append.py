"""Something appended to what a program carries from call to call, without a copy of the rest.

    cat([past, new], axis)            →   append(past, new, axis)

The result lies in memory with room behind it. Handed in again as the next call's `past`, only what
is new is written: in a step of decoding the cache stays where it is. What was returned before is
never changed by it: if `past` ends before the room is free (somebody went back, or on from it
twice), all of it is copied, as `cat` does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE, LEAST = 4, 64
"""Room for a quarter more, and for so many at least."""
KEY = "qcompiler_room"
_lock = threading.Lock()


@dataclass
class _Room:
    """What is known of memory with room in it; an attribute of the storage itself."""

    stride: tuple[int, ...]
    axis: int
    dtype: torch.dtype
    used: int
    size: int
    """Along the axis, as `used`."""

    def take(self, past: Tensor, axis: int, end: int) -> bool:
        """Whether `past` fills what is used of it and there is room up to `end`, then taken."""
        mine = past.stride() == self.stride and past.storage_offset() == 0
        mine = mine and (axis, past.dtype) == (self.axis, self.dtype)
        # What was made in inference mode may be written to in it alone.
        mine = mine and (not past.is_inference() or torch.is_inference_mode_enabled())
        with _lock:
            free = mine and past.shape[axis] == self.used and end <= self.size
            if free:
                self.used = end
        return free


def append(past: Tensor, new: Tensor, axis: int) -> Tensor:
    """cat([past, new], axis). It may share memory with `past`, none of which changes."""
    shape, part = [*past.shape], [*past.shape]
    length, part[axis] = past.shape[axis], new.shape[axis]
    if type(past) is not Tensor or [*new.shape] != part or new.dtype != past.dtype:
        # What only looks like a tensor has no memory to grow in; torch says what does not fit.
        return torch.cat([past, new], axis)
    shape[axis] = end = length + new.shape[axis]
    room: _Room | None = getattr(past.untyped_storage(), KEY, None)
    if length and room is not None and room.take(past, axis, end):
        whole = past.as_strided(shape, room.stride)
        place = length * room.stride[axis]
        past.as_strided(part, room.stride, place).copy_(new)
        return whole
    wide = [*shape]
    wide[axis] = end + max(end // SHARE, LEAST)
    memory = past.new_empty(wide)
    setattr(
        memory.untyped_storage(), KEY, _Room(memory.stride(), axis, past.dtype, end, wide[axis])
    )
    whole = memory.narrow(axis, 0, end)
    whole.narrow(axis, 0, length).copy_(past)
    whole.narrow(axis, length, new.shape[axis]).copy_(new)
    return whole
