"""Our rows: run a pipeline, measure what came of it, count its bits."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from string import Template

from qcompiler.passbase import Pass
from qcompiler.pipeline import run_pipeline
from qcompiler.program import Program
from qcompiler.registry import get_rounding, make_passes
from qcompiler.samples import Flat
from qcompiler.sites import sites

from .cases import Case, Run
from .grid import Cell
from .rows import OURS, Row


def float_row(case: Case) -> Row:
    value, extra = case.measure(case.program.flat)
    row = Row(OURS, case.name, "float", "float", metric=case.metric, value=value, extra=extra)
    return replace(row, model_bits=case.program.bytes * 8 / parameters(case.program))


def row_of(case: Case, cell: Cell, seeds: int) -> Row:
    """The row, or the reason why there is none: a method that fails ends no benchmark."""
    row = Row(
        *(OURS, case.name, cell.format, cell.method, cell.rotation, case.metric),
        pipeline=cell.pipeline,
    )
    observed, start, runs = case.observed, time.perf_counter(), []
    try:
        for seed in range(seeds if "$seed" in cell.pipeline else 1):
            passes = make_passes(Template(cell.pipeline).substitute(seed=seed))
            runs.append(_once(case, passes, observed))
    except Exception as error:
        text = " ".join(str(error).split())
        return replace(row, error=f"{type(error).__name__}: {text[:300]}")
    values, extras, bits, sizes, times = zip(*runs, strict=True)
    return replace(
        row,
        value=statistics.fmean(values),
        values=values,
        extra={k: statistics.fmean(e[k] for e in extras) for k in extras[0]},
        bits_per_weight=statistics.fmean(bits),
        model_bits=statistics.fmean(sizes),
        seconds=statistics.fmean(times),
        wall=time.perf_counter() - start,
    )


def _once(
    case: Case, passes: tuple[Pass, ...], observed: list[Flat]
) -> tuple[float, dict[str, float], float, float, float]:
    """(value, extra, bits per quantized weight, bits per parameter, seconds) of one run."""
    for step in passes:
        if rounding := getattr(step, "rounding", None):
            get_rounding(rounding)  # one that is not there is told before anything is computed
    start = time.perf_counter()
    quantized = run_pipeline(case.program, passes, data=lambda: iter(observed))
    seconds = time.perf_counter() - start
    run: Run = quantized.flat
    value, extra = case.measure(run)
    whole = quantized.bytes * 8 / parameters(case.program)
    return value, extra, bits_per_weight(case.program, quantized), whole, seconds


def parameters(program: Program) -> int:
    return sum(t.numel() for t in program.params.values())


def bits_per_weight(source: Program, quantized: Program) -> float:
    """Bits of all that stands for the quantized weights, over their number.

    Those are the sites of `source` that the plan gives a weight format. Sites that only `quantized`
    has, such as a linear for outlier channels, stand for them too.
    """
    planned = {id for id, scheme in quantized.plan.items() if scheme.weight is not None}
    before = {site.id: site for site in sites(source.graph.nodes)}
    count = {
        before[id].weight.name: before[id].weight.meta["val"].numel() for id in planned & {*before}
    }
    held: dict[str, int] = {}
    for site in sites(quantized.graph.nodes):
        if site.id not in planned and site.id in before:
            continue
        waiting = [site.weight]
        while waiting:
            node = waiting.pop()
            if name := quantized.param_of(node):
                tensor = quantized.params[name]
                held[name] = tensor.numel() * tensor.element_size()
            waiting.extend(node.all_input_nodes)
    return sum(held.values()) * 8 / sum(count.values())
