"""Where a walk through a program stands, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from qcompiler.blocks import Values
from qcompiler.formats import QFormat, QTensor
from qcompiler.keep import Keep, Tensors, pack_tensor, unpack_tensor
from qcompiler.program import Program

NAME = "walk"


@dataclass(frozen=True, eq=False)
class Solved:
    """A site's weight, rounded."""

    weight: QTensor
    """Of the weight by rows: (out, in), or (out, in · taps)."""
    vectors: int = 0
    """Input vectors that were seen for it."""
    error: float | None = None
    """tr(E H Eᵀ) / tr(W H Wᵀ): how far off the layer's output is; None where H is not known."""
    notes: tuple[str, ...] = ()
    """What the rounding has to say."""

    @property
    def words(self) -> str:
        """How far off its output is, to go behind a reason; empty where that is not known."""
        if self.error is None:
            return ""
        return f"; its output is off by {self.error**0.5:.2%} on {self.vectors} vectors"


@dataclass
class State:
    """Blocks that are done, and what goes on to the next one."""

    done: int
    solved: dict[str, Solved]
    exact: list[Values]
    """Values of each batch in the float program; empty if nobody asks for them."""
    rounded: list[Values]
    """The same with what is done rounded."""


def write_state(keep: Keep, state: State) -> None:
    """Put the state on disk, whole."""
    tensors: Tensors = {}
    solved: dict[str, list[object]] = {}
    for id, s in state.solved.items():
        held, fmt = pack_tensor(s.weight, f"solved.{id}")
        tensors |= held
        solved[id] = [fmt, s.vectors, s.error, s.notes]
    numbers: dict[str, object] = {}
    for kind in ("exact", "rounded"):
        for i, values in enumerate(getattr(state, kind)):
            for node, value in values.items():
                if node.op == "placeholder":
                    continue  # an input: it is handed over again
                if isinstance(value, Tensor):
                    tensors[f"{kind}.{i}.{node.name}"] = value
                else:
                    numbers[f"{kind}.{i}.{node.name}"] = value
    keep.save(NAME, tensors, {"done": state.done, "solved": solved, "numbers": numbers})


def read_state(keep: Keep, program: Program, given: Sequence[Values]) -> State | None:
    """The state on disk, with the inputs `given`; None if there is none."""
    found = keep.load(NAME)
    if found is None:
        return None
    tensors, about = found
    assert isinstance(about, dict)
    solved = {
        id: Solved(
            unpack_tensor(tensors, f"solved.{id}", QFormat.parse(fmt)), count, error, tuple(notes)
        )
        for id, (fmt, count, error, notes) in about["solved"].items()
    }
    nodes: dict[str, fx.Node] = {n.name: n for n in program.graph.nodes}
    streams: dict[str, list[Values]] = {k: [dict(v) for v in given] for k in ("exact", "rounded")}
    kinds = set()
    for name, value in [*tensors.items(), *about["numbers"].items()]:
        kind, _, rest = name.partition(".")
        if kind in streams:
            number, _, node = rest.partition(".")
            streams[kind][int(number)][nodes[node]] = value
            kinds.add(kind)
    exact = streams["exact"] if "exact" in kinds else []
    return State(about["done"], solved, exact, streams["rounded"])


def remarks(solved: Mapping[str, Solved], grams: bool) -> list[str]:
    """What roundings have to say; with `grams`, also where a Gram matrix cannot have full rank."""
    said: dict[str, list[str]] = {}
    for id, s in solved.items():
        for note in s.notes:
            said.setdefault(note, []).append(id)
    found = []
    for note, ids in said.items():
        more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
        found.append(f"{', '.join(ids[:3])}{more}: {note}")
    if not grams:
        return found
    short = [s for s in solved.values() if 0 < s.vectors < s.weight.data.shape[1]]
    if short:
        worst = max(short, key=lambda s: s.weight.data.shape[1] / s.vectors)
        width = worst.weight.data.shape[1]
        found.append(
            f"{len(short)} layers saw fewer input vectors than they have inputs ({worst.vectors} "
            f"of {width}): their Gram matrix is singular; hand over at least "
            f"{-(-width // worst.vectors)} times the data"
        )
    if blind := [id for id, s in solved.items() if s.vectors == 0]:
        found.append(f"rounded to nearest, as no input vectors were seen: {', '.join(blind[:5])}")
    return found
