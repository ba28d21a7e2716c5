"""One trial: a subject in one scheme, as one kernel of a backend runs it, beside the reference.

    ‖ artifact(x) - program(x) ‖  ≤  the claim's tolerance · the output's size        on every input

`wanted.py` says what that size is, and what is no error: in bfloat16 what the program itself is off
float32, for one. Every result must be the same, to the last bit, on a second call, after other
calls, on another number of threads, and saved and loaded again.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from qcompiler.backend import Artifact, Backend, Capability, Lowered
from qcompiler.check import relative_error
from qcompiler.compiled import lower
from qcompiler.edit import Edit
from qcompiler.errors import BackendError, QCompilerError, first_line
from qcompiler.formats import Scheme
from qcompiler.pipeline import run_pipeline
from qcompiler.program import Program, op_name
from qcompiler.registry import make_passes
from qcompiler.run import evaluate
from qcompiler.samples import Flat
from qcompiler.sites import Site, sites
from qcompiler.testing.report import Case
from qcompiler.testing.subjects import Subject
from qcompiler.testing.wanted import Wanted, wanted

QUANTIZE = "quantize{budget=1e12}"
"""Zeros and outliers may be off by more than they are large; only what the kernel adds counts."""
THREADS = "on two threads"
Outputs = tuple[object, ...]


def quantized(subject: Subject, scheme: Scheme) -> Program | None:
    """The subject with every site in `scheme`; None where weights or inputs cannot be."""
    edit = Edit(subject.program, "assign")
    for site in sites(edit.nodes):
        edit.spend(str(scheme), site.node)
        edit.assign(site.node, scheme)
    batch = subject.inputs[0][1]
    try:
        return run_pipeline(edit.seal()[0], make_passes(QUANTIZE), data=lambda: [batch])
    except QCompilerError:
        return None


@dataclass(frozen=True, eq=False)
class Built:
    """A quantized program as one kernel of a backend is to run it."""

    backend: Backend
    lowered: Lowered
    artifact: Artifact
    wrong: frozenset[str]
    """Sites whose kernel was off the reference, so that lowering took it out again."""

    @classmethod
    def of(cls, program: Program, backend: Backend, kernel: str) -> Built:
        limited = backend.only(kernel)
        lowered, notes = lower(program, limited, None, None)
        artifact = limited.build(lowered.program)
        return cls(limited, lowered, artifact, frozenset(n.partition(": ")[0] for n in notes))

    def kernel(self, site: str) -> str | None:
        """The kernel that serves a site; "" if the backend does not tell, None if none does."""
        named = {**self.lowered.kernels, **(self.artifact.kernels or {})}
        if site in named:
            return named[site].partition(",")[0].partition(";")[0]
        silent = self.artifact.kernels is None and not self.backend.lowering()
        return "" if silent else None

    def loaded(self) -> Artifact:
        """Saved, and made again of that."""
        with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
            self.artifact.save(Path(folder))
            return self.backend.load(self.lowered.program, Path(folder))


def attempt(subject: Subject, scheme: Scheme, backend: Backend, claim: Capability) -> list[Case]:
    """What comes of each weight of `subject` in `scheme`; nothing if there is no such program."""
    program = quantized(subject, scheme)
    if program is None:
        return []
    formats = " × ".join(str(f or "float") for f in (scheme.weight, scheme.activation))
    names = [f"{formats}, {subject}, {kind}" for kind in subject.kinds]
    try:
        why = [backend.only(claim.kernel).refuses(site, scheme) for site in subject.sites]
        if all(why):
            return [Case(name, refusal=str(w)) for name, w in zip(names, why, strict=True)]
        built = Built.of(program, backend, claim.kernel)
        cases = [_unserved(built, site.id, name, claim) for site, name in _each(subject, names)]
        if None in cases:
            check_fakes(built.lowered.program, subject.inputs[0][1])
            runs = Runs.of(built, {w: x for w, x in subject.inputs if _defined(program, x)})
            wants = {w: wanted(program, subject, x, claim.flips) for w, x in runs.inputs.items()}
            judged = [_judge(runs, wants, at, name, claim) for at, name in enumerate(names)]
            cases = [case or judged[at] for at, case in enumerate(cases)]
    except Exception as error:  # whatever another's code raises is its failure, told by name
        words = f"{type(error).__name__}: {first_line(error)}"
        return [Case(name, failure=words) for name in names]
    return [case for case in cases if case is not None]


def check_fakes(program: Program, x: Flat) -> None:
    """An operator's fake says what shape and type it returns: what torch.compile, torch.export and
    later passes go by."""

    def check(node: fx.Node, value: object) -> None:
        fake = node.meta.get("val")
        if not isinstance(value, Tensor) or not isinstance(fake, Tensor):
            return
        sizes = zip(fake.shape, value.shape, strict=False)
        fits = all(n == m for n, m in sizes if isinstance(n, int))
        if fake.dtype != value.dtype or fake.ndim != value.ndim or not fits:
            raise BackendError(
                f"{op_name(node.target)} returns {value.dtype} {[*value.shape]} where its fake "
                f"operator says {fake.dtype} {[*fake.shape]}"
            )

    evaluate(program, x, check)


def _each(subject: Subject, names: list[str]) -> Iterator[tuple[Site, str]]:
    return zip(subject.sites, names, strict=True)


def _unserved(built: Built, site: str, name: str, claim: Capability) -> Case | None:
    """The case of a site that the claim's kernel does not serve; None if it does."""
    kernel, refused = built.kernel(site), built.lowered.refused.get(site)
    words = built.lowered.kernels.get(site, kernel)
    if site in built.wrong:
        return Case(name, failure=str(refused))
    if kernel in ("", claim.kernel):
        return None
    other = f"{words} serves it instead" if kernel else "nothing serves it, and nothing says why"
    return Case(name, refusal=refused or other)


@dataclass(frozen=True, eq=False)
class Runs:
    """Outputs on each input, and again in other ways."""

    inputs: Mapping[str, Flat]
    found: Mapping[str, Outputs]
    again: Mapping[str, Mapping[str, Outputs]]
    """How, in words → outputs on each input."""

    @classmethod
    def of(cls, built: Built, inputs: Mapping[str, Flat]) -> Runs:
        def run(artifact: Artifact) -> dict[str, Outputs]:
            return {words: _call(artifact, words, x) for words, x in inputs.items()}

        with threads(1):
            first, found = {}, {}
            for words, x in inputs.items():
                first[words] = _call(built.artifact, words, x)
                found[words] = tuple(map(_copy, first[words]))
            second = run(built.artifact)
        with threads(2):
            wide = run(built.artifact)
            loaded = run(built.loaded())
        again = {
            "once later calls have been made": first,
            "on a second call": second,
            THREADS: wide,
            f"saved, loaded and {THREADS}": loaded,
        }
        return cls(inputs, found, again)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(artifact: Artifact, words: str, x: Flat) -> Outputs:
    try:
        return artifact.run(x)
    except Exception as error:
        raise BackendError(f"fails on {words}: {error!r}") from error


def _copy(output: object) -> object:
    return output.clone() if isinstance(output, Tensor) else output


def _defined(program: Program, x: Flat) -> bool:
    """Whether the reference itself has a result: the range of an empty batch has none."""
    try:
        program.flat(x)
    except (RuntimeError, IndexError):
        return False
    return True


def _judge(
    runs: Runs,
    wants: Mapping[str, list[Wanted]],
    at: int,
    name: str,
    claim: Capability,
) -> Case:
    """The case of the output `at`, on all inputs."""
    worst = 0.0
    for words, outputs in runs.found.items():
        want, found = wants[words][at], outputs[at]
        own = want.own
        if not isinstance(found, Tensor) or (found.dtype, found.shape) != (own.dtype, own.shape):
            what = f"{found.dtype} {[*found.shape]}" if isinstance(found, Tensor) else repr(found)
            wrong = f"returns {what} for {own.dtype} {[*own.shape]} on {words}"
            return Case(name, math.inf, wrong)
        error = want.error(found)
        worst = max(worst, error)
        if not error <= claim.tolerance:
            allows = f"(allowed {claim.tolerance:.0e})"
            return Case(name, worst, f"is off by {error:.1e} {allows} on {words}")
        for how, other in runs.again.items():
            if not _same(found, other[words][at], claim, how):
                return Case(name, worst, f"gives another result {how}, on {words}")
    return Case(name, worst)


def _same(a: Tensor, b: object, claim: Capability, how: str) -> bool:
    """Whether two results are equal, to the last bit unless the claim makes an exception."""
    if not isinstance(b, Tensor):
        return False
    if claim.splits_sums and THREADS in how:
        return relative_error(a, b) <= claim.tolerance
    return torch.equal(a, b)
