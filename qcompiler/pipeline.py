"""The pipeline: runs passes in order, computes the facts they need, and holds them to their word.

After each pass the two sealed programs are compared and the promise checked. A pass that broke it
is run again with less fuel until the first bad edit is found; the error names that edit and its
nodes, and the program is the one before the pass.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompiler.check import Checker, Verdict, sqnr_db
from qcompiler.diff import Diff, diff, fingerprint, snapshot
from qcompiler.edit import Edit, OutOfFuel
from qcompiler.errors import PassError, QCompilerError
from qcompiler.facts import NEEDS, Facts, measure
from qcompiler.history import Effect, Reason, Step
from qcompiler.keep import Keep
from qcompiler.order import check_order
from qcompiler.passbase import Pass
from qcompiler.program import Program, digest, node_id
from qcompiler.samples import Flat, check_inputs, synthetic_data
from qcompiler.tagged import Tagged, apart, untag
from qcompiler.version import __version__


@dataclass(frozen=True)
class Progress:
    """What a watcher is told: which pass, what it is doing, how far it is."""

    index: int
    total: int
    name: str
    doing: str
    """`synthesizing`, `rewriting`, `calibrating`, `optimizing`, `checking`, `bisecting`, `done`."""
    batch: int = 0
    """Batches seen so far, or steps done while `optimizing`."""
    of: int = 0
    """How many there will be; 0 if not known."""


ROUNDED = 1e-5
"""An error that is more than float32's rounding of a weight."""
RANDOM = "calibrated on random inputs; hand over data to see the real ranges"
ON_THE_EDGE = (
    "That is about what float32 rounds off: write the map on the weight's edge (edit.new_param, "
    "edit.call, edit.extend), where it is exact and `fold` rounds once, or declare the pass lossy"
)

Watcher = Callable[[Progress], None]
Data = Callable[[], Iterable[Flat | Tagged[Flat]]]
"""Makes a fresh iterator over calibration batches; called once for each pass that needs one."""


def run_pipeline(
    program: Program,
    passes: Sequence[Pass],
    *,
    data: Data | None = None,
    example: Flat | None = None,
    watch: Watcher | None = None,
    keep: Keep | None = None,
) -> Program:
    """Run `passes` over `program` and return the last sealed program, with its history.

    With `keep`, long work is written down there as it goes, and a run that was killed goes on from
    it when it is started again with the same model, data and passes.

    Raises `PassError` when a pass breaks its promise; `program` is untouched in any case.
    """
    check_order(passes)
    checker = Checker(program, check_inputs(program.io, example))
    feed = _Feed(program, data, keep)
    for index, step in enumerate(passes):

        def tell(
            doing: str, batch: int = 0, of: int = 0, at: int = index, name: str = step.name
        ) -> None:
            if watch is not None:
                watch(Progress(at, len(passes), name, doing, batch, of))

        program = _run_pass(program, step, feed, checker, tell)
        tell("done")
    return program


class _Feed:
    """Calibration data, the user's or random ones, and where what comes of them is kept."""

    def __init__(self, program: Program, data: Data | None, keep: Keep | None) -> None:
        self._synthetic = data is None
        self._data = data or (lambda: synthetic_data(program.io))
        self._keep = keep
        self._digest = data_digest(self._data()) if keep is not None else ""

    def facts(self, program: Program, step: Pass, tell: Callable[..., None]) -> Facts:
        """The facts that `step` needs of `program`."""
        needs = step.needs_for(program)
        if unknown := set(needs) - set(NEEDS):
            raise PassError(
                f"pass {step.name!r} needs unknown facts {sorted(unknown)}; known: {NEEDS}"
            )
        tick = lambda done, total: tell("optimizing", done, total)  # noqa: E731 (a name for a call)
        if not needs:
            return Facts(program, tick=tick)
        keep = self._keep and self._keep.under(
            __version__, fingerprint(program), self._digest, step
        )
        batches = self._data()
        of = len(batches) if isinstance(batches, Sized) else 0
        found = measure(program, batches, needs, lambda n: tell("calibrating", n, of), keep)
        return replace(found, synthetic=self._synthetic, tick=tick, keep=keep)


def data_digest(data: Iterable[Flat | Tagged[Flat]]) -> str:
    """A name for the content of all batches."""
    hasher = hashlib.sha256()
    for batch in data:
        tag, inputs = untag(batch)
        for value in (tag, *inputs):
            hasher.update((digest(value) if isinstance(value, Tensor) else repr(value)).encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class _Attempt:
    """What came out of running a pass with some amount of fuel."""

    program: Program
    edits: tuple[Reason, ...]
    skipped: tuple[Reason, ...]
    notes: tuple[str, ...]
    change: Diff
    verdict: Verdict


def _run_pass(
    program: Program, step: Pass, feed: _Feed, checker: Checker, tell: Callable[..., None]
) -> Program:
    start = time.perf_counter()
    facts = feed.facts(program, step, tell)
    tell("rewriting")

    def attempt(fuel: int | None) -> _Attempt:
        return _attempt(program, step, facts, checker, fuel, tell)

    full = attempt(None)
    limit = step.tolerance(facts)
    if not full.verdict.error <= limit:
        raise _guilty(step, full, attempt, limit, tell)
    if not full.change and not step.optional:
        reasons = "; ".join([*full.notes, *(f"{r.nodes[0]}: {r.why}" for r in full.skipped[:3])])
        raise PassError(
            f"pass {step.name!r} changed nothing"
            + (f" ({reasons})" if reasons else "")
            + f"; take it out of the pipeline, or write {step.name}{{optional=true}}"
        )
    notes = (*full.notes, *apart(facts.by_tag, program.plan))
    if facts.synthetic:
        notes = (*notes, RANDOM)
    metrics = {"error": full.verdict.error, **full.verdict.metrics}
    record = Step(
        name=step.name,
        spec=str(step),
        effect=step.effect,
        diff=full.change,
        after=snapshot(full.program, program.history[-1].after, program),
        edits=full.edits,
        skipped=full.skipped,
        metrics=metrics,
        nodes=full.verdict.nodes,
        notes=notes,
        seconds=time.perf_counter() - start,
    )
    return full.program.with_history(record)


def _attempt(
    program: Program,
    step: Pass,
    facts: Facts,
    checker: Checker,
    fuel: int | None,
    tell: Callable[..., None],
) -> _Attempt:
    edit = Edit(program, step.name, fuel)
    # What was made in inference mode does not count how often it is written to.
    counted = {n: value for n, value in program.params.items() if not value.is_inference()}
    written = {name: value._version for name, value in counted.items()}
    try:
        step.run(edit, facts)
    except OutOfFuel:
        pass
    except QCompilerError:
        raise
    except Exception as error:  # any bug of a third party's pass, told with its name and place
        raise PassError(f"pass {step.name!r} failed{edit.place()}: {error!r}") from error
    if in_place := [n for n, version in written.items() if counted[n]._version != version]:
        raise PassError(
            f"pass {step.name!r} wrote into {', '.join(in_place[:3])} in place. The model that was "
            "handed over has the same tensor, and is changed: load it again. A pass gives a "
            "parameter another value by edit.set_param"
        )
    after, edits, skipped, notes = edit.seal()
    known = program.history[-1].after
    change = diff(known, snapshot(after, known, program))
    touched = {id for e in edits for id in e.nodes}
    _refuse_silent_changes(step, change, touched)
    if fuel is None:
        tell("checking")
    try:
        verdict = checker.check(step.effect, program, after, change, touched)
    except Exception as error:  # the rewritten graph does not even run: as wrong as can be
        if not edits:
            raise
        verdict = Verdict(error=float("inf"), failure=f"{type(error).__name__}: {error}")
    return _Attempt(after, edits, skipped, notes, change, verdict)


def _refuse_silent_changes(step: Pass, change: Diff, touched: set[str]) -> None:
    """Every change must belong to an edit with a reason; unused leftovers may disappear."""
    changed = {*change.added, *change.rewired, *change.params, *change.params_added}
    if silent := sorted(changed - touched):
        raise PassError(
            f"pass {step.name!r} changed {', '.join(silent[:3])} behind the editor's back; "
            "every change goes through edit.call, edit.replace, … after edit.spend(why)"
        )


def _draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers: dropout does in training alone, attention with some."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    known = target._schema.arguments
    given = {a.name: a.default_value for a in known if a.has_default_value()}
    given |= {a.name: v for a, v in zip(known, node.args, strict=False)} | dict(node.kwargs)
    never = any(given.get(n, 1) == 0 for n in ("dropout_p", "dropout", "p", "train", "training"))
    return torch.Tag.nondeterministic_seeded in target.tags and not never


def _guilty(
    step: Pass,
    full: _Attempt,
    attempt: Callable[[int | None], _Attempt],
    limit: float,
    tell: Callable[..., None],
) -> PassError:
    """The error that names the first edit that breaks the promise."""
    if drawn := [node_id(n) for n in full.program.nodes if _draws(n)]:
        return PassError(
            f"the model draws random numbers, at {', '.join(drawn[:3])}: equal inputs give other "
            f"outputs each time, and what pass {step.name!r} promises cannot be checked. Leave "
            "them out in evaluation mode, or make them an input",
            nodes=tuple(drawn),
        )
    if not full.edits:
        return PassError(f"pass {step.name!r} broke its promise without an edit")
    guilty = _off_by_themselves(full, limit) if step.effect is Effect.LOWER else []
    if guilty:
        bad, worst = guilty[0] + 1, full
    else:
        tell("bisecting")
        bad, worst = _bisect(full, attempt, limit)
    first = full.edits[bad - 1]
    where = f" at {worst.verdict.output}" if worst.verdict.output else ""
    what = {
        Effect.EXACT: (
            f"differs by {worst.verdict.error:.1e}{where} in float64 (allowed {limit:.0e})"
        ),
        Effect.PLAN: f"changed the graph or a parameter ({worst.change})",
        Effect.LOSSY: (
            f"costs a relative error of {worst.verdict.error:.3g}{where} (budget {limit:.3g})"
        ),
        Effect.LOWER: f"is off the reference by {worst.verdict.error:.1e} (allowed {limit:.0e})",
    }[step.effect]
    if worst.verdict.failure:
        what = f"leaves a program that fails to run: {worst.verdict.failure}"
    rounded = step.effect is Effect.EXACT and limit < worst.verdict.error < ROUNDED
    return PassError(
        f"pass {step.name!r} promises {step.effect} but {what}; rolled back. First bad edit: "
        f"number {bad} of {len(full.edits)}, {first.why!r}, at {', '.join(first.nodes[:4])}"
        + (f". {ON_THE_EDGE}" if rounded and worst.change.params else ""),
        what=what,
        nodes=tuple(full.edits[n].nodes[0] for n in guilty) or first.nodes,
    )


def _off_by_themselves(full: _Attempt, limit: float) -> list[int]:
    """Edits of a lowering whose nodes are off; each was compared with the one it stands for."""
    off = {id for id, db in full.verdict.nodes.items() if not db >= sqnr_db(limit)}
    guilty = []
    for number, edit in enumerate(full.edits):
        if not off.isdisjoint(edit.nodes):
            guilty.append(number)
            off -= set(edit.nodes)  # explained; a later edit there may well be right
    return guilty


def _bisect(
    full: _Attempt, attempt: Callable[[int | None], _Attempt], limit: float
) -> tuple[int, _Attempt]:
    """The smallest number of edits that already breaks the promise, and what they make."""
    good, bad, worst = 0, len(full.edits), full
    while bad - good > 1:
        middle = (good + bad) // 2
        trial = attempt(middle)
        if trial.verdict.error <= limit:
            good = middle
        else:
            bad, worst = middle, trial
    return bad, worst
