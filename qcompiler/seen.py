"""What calibration has seen so far: statistics of each site, merged as batches stream by.

They are kept apart by the tags of the batches (see `tagged.py`), so that each tag counts the same
in the end, however many batches it has; and they can be written down and read again.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qcompiler.keep import Keep
from qcompiler.observers import Histogram, Range, Sample, Statistic, evenly

STATISTICS: Mapping[str, type[Statistic]] = {
    "activations": Range,
    "samples": Sample,
    "histograms": Histogram,
}
"""Need → what is seen for it."""
LARGE = ("samples",)
"""Needs whose statistics are too large to be kept for each tag."""


class Seen:
    """Statistics for some needs, of the first `batches` batches."""

    def __init__(self, kinds: Mapping[str, type[Statistic]], keep: Keep | None) -> None:
        """Empty, or what a run before this one has written to `keep`."""
        self._kinds, self._keep, self._name = kinds, keep, "+".join(kinds)
        self._found: dict[tuple[str, str, str], Statistic] = {}
        """(tag, need, site id) → what was seen."""
        self.batches = 0
        kept = keep.load(self._name) if keep is not None and kinds else None
        if kept is not None:
            self._restore(kept[0])
            self.batches = int(str(kept[1]))

    def add(self, id: str, tag: str, rows: Tensor) -> None:
        """Look at `rows` (vectors, channels), float32."""
        for need, kind in self._kinds.items():
            key = ("" if need in LARGE else tag, need, id)
            new, old = kind.of(rows), self._found.get(key)
            self._found[key] = new if old is None else old.merge(new)

    def merged(self) -> dict[str, dict[str, Statistic]]:
        """Need → site id → what was seen with all tags, each of which counts the same."""
        parts: dict[tuple[str, str], list[Statistic]] = {}
        for key in sorted(self._found, key=lambda key: key[0]):
            parts.setdefault(key[1:], []).append(self._found[key])
        found: dict[str, dict[str, Statistic]] = {need: {} for need in self._kinds}
        for (need, id), statistics in parts.items():
            found[need][id] = evenly(statistics)
        return found

    def ranges(self) -> dict[str, dict[str, Range]]:
        """Tag → site id → range of its input."""
        found: dict[str, dict[str, Range]] = {}
        for (tag, _, id), statistic in self._found.items():
            if isinstance(statistic, Range):
                found.setdefault(tag, {})[id] = statistic
        return found

    def write(self) -> None:
        """Put all of it on disk, if there is a place for it."""
        if self._keep is None:
            return
        tensors = {
            f"{need}|{id}|{name}|{tag}": value
            for (tag, need, id), statistic in self._found.items()
            for name, value in statistic.state().items()
        }
        self._keep.save(self._name, tensors, self.batches)

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        states: dict[tuple[str, str, str], dict[str, Tensor]] = {}
        for key, value in tensors.items():
            need, id, name, tag = key.split("|", 3)
            states.setdefault((tag, need, id), {})[name] = value
        for found, state in states.items():
            self._found[found] = self._kinds[found[1]].restore(state)
