"""The front door: `compile` a model with a recipe for a backend, get something that runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import Tensor

from qcompiler.agreement import check_artifact
from qcompiler.backend import Artifact, Backend, Lowered, ProgramArtifact
from qcompiler.capture import Dynamic, Model, Source, open_model
from qcompiler.comparison import Comparison, compare
from qcompiler.errors import BackendError, BadInput, PassError
from qcompiler.export import export_onnx
from qcompiler.generation import Options, Prompts, generate, padded
from qcompiler.history import Step
from qcompiler.indices import check_indices, explained
from qcompiler.io import as_call
from qcompiler.keep import Keep
from qcompiler.module import as_module
from qcompiler.passbase import Pass
from qcompiler.pipeline import RANDOM, Progress, Watcher, run_pipeline
from qcompiler.program import Program
from qcompiler.recipe import DEFAULT, Recipe, load_recipe
from qcompiler.registry import get_backend, make_passes
from qcompiler.samples import Flat, check_inputs
from qcompiler.show.account import Account
from qcompiler.sites import sites
from qcompiler.spec import PassSpec
from qcompiler.store import About, read, save
from qcompiler.stored import bits_per_weight
from qcompiler.synthetic import Tick, synthesize
from qcompiler.tagged import Tagged, with_tag

Batches = Iterable[object] | Literal["synthetic"]
"""Calibration batches: each a tensor, a tuple of inputs, or a mapping of inputs, or one of these
`Tagged`. `synthetic` are made from the model itself (see `synthetic.py`)."""
PLANNED = "canonicalize{{optional=true}},assign,quantize{{rounding={}}}"
"""What is done with a plan unless the user says otherwise."""
MADE = "calibrated on data that were made from the model itself"


@dataclass(frozen=True, eq=False)
class Compiled:
    """What `compile` returns: runs like the model, and tells everything that was done to it."""

    program: Program
    """The quantized program, before lowering: what is saved, inspected and rewritten further."""
    artifact: Artifact
    backend: Backend
    float_bytes: int
    """Bytes of the parameters at capture."""
    source: Source = field(default_factory=lambda: Source("module"))
    lowered: Lowered | None = None
    notes: tuple[str, ...] = ()

    @property
    def history(self) -> tuple[Step, ...]:
        """Capture, then one step for each pass."""
        return self.program.history

    @property
    def bytes(self) -> int:
        """Bytes of the quantized parameters."""
        return self.program.bytes

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of each weight that is stored in codes, all side data counted."""
        return bits_per_weight(self.program)

    @property
    def kernels(self) -> Mapping[str, str]:
        """Site → kernel that serves it on this backend."""
        return {**(self.lowered.kernels if self.lowered else {}), **(self.artifact.kernels or {})}

    @property
    def refused(self) -> Mapping[str, str]:
        """Site → why the backend runs the reference there."""
        return self.lowered.refused if self.lowered else {}

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Call with the source model's own signature; returns its own output structure."""
        io = self.program.io
        inputs = io.flatten(args, kwargs)
        try:
            with torch.no_grad():
                return io.restore(self.artifact.run(inputs))
        except IndexError as error:
            raise explained(error, self.program, inputs) from error

    def compare(self, model: Callable[..., object], *args: object, **kwargs: object) -> Comparison:
        """This beside `model`, the float one say, on one input: errors, and times in turn."""
        return compare(self, model, self.program.io.output_names, args, kwargs)

    def generate(self, input_ids: Prompts, **options: Unpack[Options]) -> Tensor:
        """`input_ids` (batch, tokens) and what the model writes behind them, at most `count` tokens
        (see `generation.generate`). It must have been compiled with `cache=True`.

        Texts of unequal length come back padded with zeros at the left."""
        written = list(self.stream(input_ids, **options))
        return torch.cat([padded(input_ids)[0], torch.stack(written, 1)], 1)

    def stream(self, input_ids: Prompts, **options: Unpack[Options]) -> Iterator[Tensor]:
        """The tokens that `generate` returns, (batch,) at a time, as they are written."""
        return generate(self, self.program.io, input_ids, **options)

    def module(self) -> torch.fx.GraphModule:
        """The artifact as a torch module, which `torch.compile` and `torch.export` take.

        It runs the same operators, one by one, under the model's own signature.
        """
        if not isinstance(self.artifact, ProgramArtifact) or self.lowered is None:
            raise BackendError(
                f"an artifact of {self.backend.name} runs no operators of torch; compile for "
                "cpu, reference or triton to have a module"
            )
        return as_module(self.lowered.program)

    def __reduce_ex__(self, protocol: object) -> str:
        raise BadInput(
            "a compiled model is not pickled or copied: save it (.save) and open it where it is "
            "wanted (qcompiler.load); threads may share one"
        )

    def diff(self) -> Account:
        """What each pass did, why, what it cost, what it skipped; prints as a table."""
        return Account(self.history)

    def save(self, directory: str | Path) -> Path:
        """Write everything to `directory`; an artifact that is there already survives a failure."""
        about = About(self.backend.name, self.float_bytes, self.source, self.notes)
        return save(self.program, self.artifact, about, Path(directory))

    def export(self, path: str | Path, *, target: str = "onnx", unsigned: bool = False) -> Path:
        """Write the quantized program as an ONNX file (see `export_onnx`)."""
        return export_onnx(self.program, path, target=target, unsigned=unsigned)


def compile(
    model: Model,
    example_inputs: object = None,
    *,
    recipe: str | Path | Recipe | None = None,
    passes: str | Sequence[Pass | str] | None = None,
    plan: str | Path | None = None,
    backend: str | Backend = "cpu",
    data: Batches | None = None,
    dynamic: Dynamic = None,
    cache: bool | str = False,
    watch: Watcher | None = None,
    work: str | Path | None = None,
) -> Compiled:
    """Capture `model`, run a pipeline over it, lower it for `backend`, and check the result.

    Give a `recipe` (name or TOML file) or `passes` (text or a sequence); neither is
    `w8a8-dynamic-smooth`. `data` are batches for passes that calibrate; without them random inputs
    serve and the step says so. `plan` is a file of `qcompiler plan`, or one written by hand: it
    takes the place of the recipe's `assign`. `cache` makes an argument of a language model's cache,
    for `Compiled.generate`; data may leave it out. A format for it (`int8`) rounds what is kept
    (see the pass `round_cache`). `watch` is told about progress. `work` is a folder for what long
    work has come to: a call that was killed, made again, goes on from there; it is removed at the
    end.
    """
    if recipe is not None and passes is not None:
        raise BadInput("give a recipe or passes, not both")
    if plan is not None and recipe is None and passes is None:
        passes = PLANNED.format("nearest" if data is None else "gptq")
    if passes is not None:
        pipeline = make_passes(passes if isinstance(passes, str) else tuple(passes))
    else:
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or DEFAULT)
        pipeline = chosen.passes()
    target = get_backend(backend) if isinstance(backend, str) else backend
    if plan is not None:
        pipeline = with_plan(pipeline, Path(plan), target)
    pipeline = suited(pipeline, target)
    if isinstance(cache, str) and cache:
        format = cache if ":" in cache else f"{cache}:token:dynamic"
        pipeline = (*pipeline, *make_passes((PassSpec("round_cache", {"format": format}),)))
    keep = None if work is None else Keep.open(Path(work))
    batches = data if data is None or data == "synthetic" else _listed(data)
    program, source, example = open_model(model, example_inputs, dynamic=dynamic, cache=bool(cache))
    flat = _flatten(program, example, "example_inputs") if example is not None else None
    ready = calibration(program, batches, _made(watch, len(pipeline)))
    feed = None if ready is None else lambda: ready
    quantized = run_pipeline(program, pipeline, data=feed, example=flat, watch=watch, keep=keep)
    steps = [s.name for s in quantized.history if RANDOM in s.notes]
    if feed is None and steps:
        warnings.warn(f"{', '.join(steps)}: {RANDOM} (data=)", stacklevel=2)
    compiled = finish(quantized, target, program, source, flat, watch)
    if keep is not None:
        keep.clear()
    return replace(compiled, notes=(*compiled.notes, MADE)) if data == "synthetic" else compiled


def with_plan(passes: Sequence[Pass], file: Path, backend: Backend) -> tuple[Pass, ...]:
    """`passes` with a plan in place of `assign`."""
    if "assign" not in {p.name for p in passes}:
        listed = ", ".join(p.name for p in passes)
        raise BadInput(f"a plan takes the place of `assign`, which is not among {listed}")
    options = {"file": str(file)} | ({"backend": backend.name} if backend.capabilities else {})
    own = make_passes((PassSpec("use_plan", options),))
    return tuple(q for p in passes for q in (own if p.name == "assign" else (p,)))


def suited(passes: Sequence[Pass], backend: Backend) -> tuple[Pass, ...]:
    """`passes` with the options that `backend` prefers, where they say nothing of them."""
    made = []
    for each in passes:
        own = each.spec.options
        prefers = backend.prefers.get(each.name, {})
        made.append(type(each).make({**prefers, **own}) if prefers.keys() - own.keys() else each)
    return tuple(made)


def load(folder: str | Path, backend: str | Backend | None = None) -> Compiled:
    """Load a saved artifact and make it run on this machine, on `backend` or the one it was for."""
    saved = read(folder)
    name = backend if backend is not None else saved.about.backend
    target = get_backend(name) if isinstance(name, str) else name
    lowered, notes = lower(saved.program, target, None, None)
    same = target.name == saved.about.backend
    artifact = (
        target.load(lowered.program, saved.content / "backend")
        if same
        else target.build(lowered.program)
    )
    about = saved.about
    return Compiled(
        saved.program, artifact, target, about.float_bytes, about.source, lowered, notes
    )


def finish(
    program: Program,
    backend: Backend,
    capture: Program,
    source: Source,
    example: Flat | None = None,
    watch: Watcher | None = None,
) -> Compiled:
    """Lower and build a quantized program, and hold the artifact against the reference."""
    lowered, notes = lower(program, backend, example, watch)
    artifact = backend.build(lowered.program)
    check_artifact(program, artifact, backend, capture, check_inputs(program.io, example)[0])
    return Compiled(program, artifact, backend, capture.bytes, source, lowered, notes)


def lower(
    program: Program, backend: Backend, example: Flat | None, watch: Watcher | None
) -> tuple[Lowered, tuple[str, ...]]:
    """Run the backend's lowering; a site whose kernel is off goes back to the reference."""
    excluded: dict[str, str] = {}
    places = {site.id for site in sites(program.nodes)}
    while True:
        passes = backend.lowering(frozenset(excluded))
        if not passes:
            return Lowered(program), ()
        try:
            result = run_pipeline(program, passes, example=example, watch=watch)
        except PassError as error:
            # What a pass behind the first one put in has an id of its own.
            new = [i for i in error.nodes if i not in excluded]
            bad = [i for i in new if i in places] or [i for i in new if i in program.by_id] or new
            if not bad:
                raise
            for id in bad:
                excluded[id] = f"its kernel is off the reference here: {error.what}"
            continue
        steps = result.history[len(program.history) :]
        refused = {r.nodes[0]: r.why for s in steps for r in s.skipped} | excluded
        edits = [e for s in steps for e in s.edits if e.nodes[0] in places]
        kernels = {e.nodes[0]: e.why for e in edits}
        notes = tuple(f"{id}: {why}" for id, why in excluded.items())
        return Lowered(replace(result, history=program.history), kernels, refused), notes


def build(program: Program, backend: Backend) -> Artifact:
    """A program as `backend` runs it, quantized or not: lowered and built, without any check."""
    return backend.build(lower(program, backend, None, None)[0].program)


def calibration(
    program: Program, data: Batches | None, tick: Tick = lambda done, total: None
) -> Sequence[Flat | Tagged[Flat]] | None:
    """Calibration batches as the program's flat inputs, made by the program itself if so asked."""
    if data == "synthetic":
        return synthesize(program, tick=tick)
    if data is None:
        return None
    return [_ready(program, b, f"data batch {i}") for i, b in enumerate(_listed(data))]


def _made(watch: Watcher | None, passes: int) -> Tick:
    """Tell `watch` how far the making of data is."""

    def tick(done: int, total: int) -> None:
        if watch is not None:
            watch(Progress(0, passes, "data", "synthesizing", done, total))

    return tick


def _listed(data: Iterable[object]) -> list[object]:
    """Batches as a list, so that several passes can go over a generator."""
    if isinstance(data, Tensor | Mapping | Tagged):
        raise BadInput("data is a sequence of batches; found one batch. Write data=[batch]")
    if isinstance(data, str):
        raise BadInput(f"data is a sequence of batches, or 'synthetic'; found {data!r}")
    batches = list(data)
    if not batches:
        raise BadInput("the calibration data is empty; expected at least one batch of inputs")
    return batches


def _ready(program: Program, batch: object, what: str) -> Flat | Tagged[Flat]:
    """A batch with its inputs flat and checked, its tag as it was."""
    if not isinstance(batch, Tagged):
        return _flatten(program, batch, what)
    flat = _flatten(program, batch.inputs, f"{what} {with_tag(batch.tag)}")
    return Tagged(batch.tag, flat)


def _flatten(program: Program, inputs: object, what: str) -> Flat:
    args, kwargs = as_call(inputs)
    try:
        flat = program.io.flatten(args, kwargs)
    except BadInput as error:
        raise BadInput(f"{what}: {error}") from error
    check_indices(program, flat, what)
    return flat
