"""The front door: `plan` a model for budgets, get what each weight should be stored in, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qcompiler.allocate import Budget
from qcompiler.backend import Backend
from qcompiler.capture import Dynamic, Model, open_model
from qcompiler.compiled import Batches, calibration
from qcompiler.costs.cache import cache_folder
from qcompiler.diff import fingerprint
from qcompiler.errors import BadInput
from qcompiler.keep import Keep
from qcompiler.passbase import Pass
from qcompiler.pipeline import Progress, Watcher, data_digest, run_pipeline
from qcompiler.planning.make import Accept, make_plan
from qcompiler.planning.planned import Planned
from qcompiler.planning.question import Question
from qcompiler.registry import get_backend, make_passes
from qcompiler.samples import synthetic_data
from qcompiler.tagged import untag
from qcompiler.version import __version__

BEFORE = "canonicalize{optional=true}"


def plan(
    model: Model,
    example_inputs: object = None,
    *,
    budgets: Sequence[str] = (),
    question: Question | None = None,
    data: Batches | None = None,
    backend: str | Backend = "cpu",
    passes: str | Sequence[Pass | str] = BEFORE,
    accept: Accept | None = None,
    dynamic: Dynamic = None,
    watch: Watcher | None = None,
    cache: str | Path | None = None,
) -> Planned:
    """Choose the format of each weight of `model` within `budgets`, for `backend`.

    `budgets` are texts such as `4.2bits`, `60MB`, `0.7x-latency`; a `question` says the rest
    (formats, metric, what must agree, …), `passes` what is done to the program before it is
    measured, as rotations and scales are. With `accept`, a function of the rounded program, it is
    the smallest plan that this says yes to. Sensitivities are kept in `cache` (the user's cache
    folder unless told otherwise), so that another budget on the same model and data costs no run of
    the model, and a run that was killed goes on.
    """
    if question is not None and budgets:
        raise BadInput("give budgets, or a question that holds them, not both")
    asked = question or Question(tuple(Budget.parse(b) for b in budgets))
    target = get_backend(backend) if isinstance(backend, str) else backend
    pipeline = make_passes(passes if isinstance(passes, str) else tuple(passes))
    program, _, _ = open_model(model, example_inputs, dynamic=dynamic)
    batches = calibration(program, data) or list(synthetic_data(program.io))
    program = run_pipeline(program, pipeline, data=lambda: batches, watch=watch)
    kept = Keep(Path(cache) if cache is not None else cache_folder("sensitivity"))

    def tell(doing: str, done: int, of: int) -> None:
        if watch is not None:
            watch(Progress(len(pipeline), len(pipeline) + 1, "plan", doing, done, of))

    planned = make_plan(
        program,
        [untag(b)[1] for b in batches],
        target,
        asked,
        accept=accept,
        keep=kept.under(__version__, fingerprint(program), data_digest(batches)),
        tell=tell,
    )
    if data is None:
        note = "measured on random inputs; hand over data to see what the model really feels"
        planned = planned.with_note(note)
    return planned
