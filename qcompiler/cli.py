"""The command line. Every table can be had as JSON; every error of the user's is one message."""

from __future__ import annotations

import logging
import math
import re
import sys
import warnings
from pathlib import Path

import click

import qcompiler
from qcompiler import pipeline
from qcompiler.capture import open_model
from qcompiler.cli_backends import BACKENDS
from qcompiler.cli_export import export
from qcompiler.cli_generate import generate_
from qcompiler.cli_lists import LISTS
from qcompiler.cli_plan import plan_
from qcompiler.cli_shared import bar, calibration, progress, tokenizer_of, with_data
from qcompiler.compiled import Compiled, build, load
from qcompiler.compiled import compile as compile_model
from qcompiler.console import as_json, err, out, print_json
from qcompiler.data import read_batches
from qcompiler.diff import Diff, diff
from qcompiler.errors import BadInput, QCompilerError
from qcompiler.evaluate import compare, perplexity, race
from qcompiler.indices import check_indices
from qcompiler.keep import write_whole
from qcompiler.pipeline import RANDOM
from qcompiler.planning.file import read_plan
from qcompiler.planning.front import BEFORE
from qcompiler.program import Program
from qcompiler.recipe import DEFAULT, load_recipe
from qcompiler.registry import get_backend, make_passes
from qcompiler.samples import random_inputs, sizes_for
from qcompiler.show.account import Account
from qcompiler.show.page import account_page
from qcompiler.show.terminal import (
    print_diff,
    print_program,
    print_spaces,
    print_stat,
    space_rows,
    steps_table,
    worst_rows,
    worst_table,
)
from qcompiler.spaces import KINDS
from qcompiler.spaces import find as find_spaces
from qcompiler.store import MANIFEST, Saved, check_place, read


class Commands(click.Group):
    """Turns errors into one message and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except QCompilerError as error:
            # Wrapped by a terminal, not here: a path in a log must be found again.
            err.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
            raise SystemExit(2) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(qcompiler.__version__)
def main() -> None:
    """Quantize neural networks by rewriting their graph, pass by checked pass."""
    # transformers imports torchao, which tells the world about CUDA libraries that a CPU lacks.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@main.command("compile")
@click.argument("model")
@click.option("-o", "--output", required=True, type=Path, help="Folder to write.")
@click.option("--recipe", help=f"Recipe name or TOML file.  [default: {DEFAULT}]")
@click.option("--passes", help="A pipeline as text, instead of a recipe.")
@click.option("--plan", type=Path, help="A file of `qcompiler plan`, in place of `assign`.")
@click.option("--backend", default="cpu", show_default=True)
@click.option(
    "--cache", is_flag=True, help="A language model with its cache as an argument, for `generate`."
)
@click.option("--cache-format", help="Round what the cache keeps, as to int8; implies --cache.")
@with_data
@click.option(
    "--work",
    type=Path,
    help="Folder for what long work has come to: after a kill, the same command goes on from it; "
    "removed at the end.  [default: OUTPUT.work]",
)
@as_json
def compile_(
    model: str,
    output: Path,
    recipe: str | None,
    passes: str | None,
    plan: Path | None,
    backend: str,
    cache: bool,
    cache_format: str | None,
    data: Path | None,
    batches: int,
    work: Path | None,
    json_: bool,
) -> None:
    """Compile MODEL (folder, .pt2, .onnx, module:factory) and write it to a folder."""
    if recipe and passes:
        raise BadInput("give --recipe or --passes, not both")
    if plan is not None:
        read_plan(plan)
    if passes or recipe or plan is None:  # a misspelt name fails before minutes of work
        passes = passes or str(load_recipe(recipe or DEFAULT))
        make_passes(passes)
    get_backend(backend)
    check_place(output)  # … and a place that cannot be written to
    feed = calibration(model, data, batches)
    work = work or output.with_name(f"{output.name}.work")
    if work.is_dir() and not json_:
        # It is kept by program, data and what is measured: of other work nothing is used.
        err.print(
            f"{work} is from a run before: what was the same work there is not done again",
            highlight=False,
        )
    with progress(json_) as watch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{re.escape(RANDOM)}")  # told below
        compiled = compile_model(
            model, passes=passes, plan=plan, backend=backend, data=feed,
            cache=cache_format or cache, watch=watch, work=work,
        )  # fmt: skip
    compiled.save(output)
    if json_:
        print_json(
            {
                "steps": compiled.diff().rows()[1:],
                "bytes": compiled.bytes,
                "float_bytes": compiled.float_bytes,
                "bits_per_weight": compiled.bits_per_weight,
                "backend": compiled.backend.name,
                "kernels": dict(compiled.kernels),
                "refused": dict(compiled.refused),
                "notes": list(compiled.notes),
                "output": str(output),
            }
        )
        return
    out.print(steps_table(compiled.diff()))
    _print_summary(compiled, output)


def _print_summary(compiled: Compiled, output: Path) -> None:
    ratio, bits = compiled.float_bytes / max(compiled.bytes, 1), compiled.bits_per_weight
    out.print(
        f"{compiled.float_bytes:,} → {compiled.bytes:,} bytes of weights ({ratio:.2f} × smaller)"
        + (f", {bits:.2f} bits for each quantized one" if bits is not None else "")
    )
    served: dict[str, int] = {}
    for why in compiled.kernels.values():
        kernel = why.partition(",")[0].partition(";")[0]
        served[kernel] = served.get(kernel, 0) + 1
    words = ", ".join(f"{kernel} on {n} sites" for kernel, n in served.items())
    out.print(f"backend {compiled.backend.name}: {words or 'runs the program as it is'}")
    for id, why in list(compiled.refused.items())[:5]:
        out.print(f"  reference at {id}: {why}", markup=False)
    said: dict[str, list[str]] = {}
    for step in compiled.history:
        for note in step.notes:
            said.setdefault(note, []).append(step.name)
    for note, names in said.items():
        out.print(f"note: {', '.join(dict.fromkeys(names))}: {note}", markup=False)
    out.print(f"written to {output}; look at it with: qcompiler diff {output} --stat")


@main.command()
@click.argument("model")
@click.option("--spaces", is_flag=True, help="What may be changed with what, and what forbids it.")
@click.option("--kind", help=f"Kind of map: {', '.join(KINDS)}; implies --spaces.")
@as_json
def inspect(model: str, spaces: bool, kind: str | None, json_: bool) -> None:
    """Show the program in MODEL, or in a compiled folder."""
    program = _program(model)
    if spaces or kind:
        canonical = program
        if len(program.history) == 1:  # a fresh capture; the analysis reads the canonical form
            passes = make_passes(BEFORE)
            canonical = pipeline.run_pipeline(program, passes)
        found = find_spaces(canonical, kind or "diagonal")
        if json_:
            print_json({"spaces": space_rows(found)})
        else:
            print_spaces(out, found)
        return
    if not json_:
        print_program(out, program)
        return
    last = program.history[-1].after
    print_json(
        {
            "inputs": [str(p) for p in program.io.tensors],
            "bytes": program.bytes,
            "nodes": [{"id": id, "call": n.call, "shape": n.shape} for id, n in last.nodes.items()],
            "parameters": {name: str(p) for name, p in last.params.items()},
            "plan": {id: str(s) for id, s in program.plan.items()},
        }
    )


@main.command("diff")
@click.argument("first")
@click.argument("second", required=False)
@click.option("--stat", is_flag=True, help="Each step with its reasons.")
@click.option("--show", "show_id", metavar="ID", help="What became of one node or parameter.")
@click.option("--why", "why_id", metavar="ID", help="Why it was changed, or left alone.")
@click.option(
    "--worst", type=click.IntRange(1), metavar="N", help="The N values that lost the most."
)
@click.option(
    "--html", "html", type=Path, metavar="FILE", help="All of it as a page that works from disk."
)
@as_json
def diff_(
    first: str,
    second: str | None,
    stat: bool,
    show_id: str | None,
    why_id: str | None,
    worst: int | None,
    html: Path | None,
    json_: bool,
) -> None:
    """Show what the passes did to OUT; compare OUT@1 with OUT@3, two artifacts, or an .onnx file
    with what became of it."""
    account, at = _open_at(first)
    if worst is not None:
        if html is not None or stat or show_id or why_id or at is not None:
            raise BadInput("--worst takes one artifact or two, as in: diff OUT OTHER --worst 10")
        rows = worst_rows(worst, account, None if second is None else _open_at(second)[0])
        if json_:
            finite = [
                {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in r.items()}
                for r in rows
            ]
            print_json({"worst": finite})
        else:
            out.print(worst_table(rows))
        return
    if html is not None:
        if second is not None or at is not None or stat or show_id or why_id or json_:
            raise BadInput("--html takes the whole of one artifact, as in: diff OUT --html FILE")
        write_whole(html, account_page(account, f"What qcompiler did to {first}"))
        out.print(f"written to {html}", markup=False, highlight=False)
        return
    if show_id or why_id:
        lines = account.show(show_id) if show_id else account.why(str(why_id))
        if json_:
            print_json([{"step": n, "pass": p, "text": t} for n, p, t in lines])
        for number, name, text in [] if json_ else lines:
            out.print(f"{number} {name}: {text}", highlight=False, markup=False)
        if not lines and not json_:
            out.print(f"no pass changed {show_id or why_id}, and none refused it")
        return
    if second is None and at is None:
        if json_:
            print_json({"steps": [_stat_row(account, n) for n in range(len(account.steps))]})
        elif stat:
            print_stat(out, account)
        else:
            out.print(steps_table(account))
        return
    if second is None:
        assert at is not None
        change = account.between(max(at - 1, 0), at)
    else:
        other, other_at = _open_at(second)
        last = len(other.steps) - 1
        before = account.at(len(account.steps) - 1 if at is None else at)
        change = diff(before, other.at(last if other_at is None else other_at))
    if json_:
        print_json(_diff_row(change))
    elif stat:
        out.print(str(change))
    else:
        print_diff(out, change)


def _stat_row(account: Account, number: int) -> dict[str, object]:
    step = account.steps[number]
    return {
        **account.rows()[number],
        "reasons": [{"why": e.why, "nodes": list(e.nodes)} for e in step.edits],
        "refusals": [{"why": e.why, "nodes": list(e.nodes)} for e in step.skipped],
        "sqnr_db": {k: v if math.isfinite(v) else None for k, v in step.nodes.items()},
        "diff": _diff_row(step.diff),
    }


def _diff_row(change: Diff) -> dict[str, object]:
    return {
        "added": list(change.added),
        "removed": list(change.removed),
        "rewired": list(change.rewired),
        "parameters": list(change.params),
        "parameters_added": list(change.params_added),
        "parameters_removed": list(change.params_removed),
        "precision": dict(change.precision),
    }


@main.command("eval")
@click.argument("artifact", type=Path)
@click.option("--data", required=True, type=Path, help="Text, .npy or .safetensors.")
@click.option(
    "--metric",
    type=click.Choice(["perplexity", "sqnr", "cosine"]),
    default="perplexity",
    show_default=True,
)
@click.option("--batches", type=int, help="Use the first batches only.")
@as_json
def eval_(artifact: Path, data: Path, metric: str, batches: int | None, json_: bool) -> None:
    """Measure a compiled folder beside the float model that it was made from."""
    saved = read(artifact)
    compiled = load(artifact)
    reference = _float_program(saved)
    tokenizer = saved.tokenizer or tokenizer_of(saved.about.source)
    raw = read_batches(data, saved.program.io, tokenizer, batches)
    feed = [saved.program.io.flatten((), b) for b in raw]
    for number, batch in enumerate(feed):
        check_indices(saved.program, batch, f"{data}, batch {number}")
    with bar("evaluating", 2 * len(feed), json_) as tick:
        if metric == "perplexity":
            result = {
                "perplexity": perplexity(compiled.artifact.run, feed, tick),
                "float_perplexity": perplexity(reference.flat, feed, tick),
            }
        else:
            sqnr, cosine = compare(compiled.artifact.run, reference.flat, feed, tick)
            result = {"sqnr": sqnr} if metric == "sqnr" else {"cosine": cosine}
    if json_:
        print_json(result)
        return
    for name, value in result.items():
        out.print(f"{name.replace('_', ' ')}: {value:.4f}{' dB' if name == 'sqnr' else ''}")
    if metric == "perplexity":
        out.print(f"ratio: {result['perplexity'] / result['float_perplexity']:.4f}")


@main.command()
@click.argument("artifact", type=Path)
@click.option(
    "--against",
    type=click.Choice(["float", "backend"]),
    default="float",
    show_default=True,
    help="The float program as it was captured, or as this backend runs it.",
)
@click.option("--batch", default=1, show_default=True)
@click.option("--sequence", default=64, show_default=True)
@click.option(
    "--past", default=0, show_default=True, help="Tokens in the cache, where there is one."
)
@as_json
def bench(artifact: Path, against: str, batch: int, sequence: int, past: int, json_: bool) -> None:
    """Time a compiled folder against the float program, in turn, on the same inputs."""
    saved, compiled = read(artifact), load(artifact)
    reference = _float_program(saved)
    runs = {against: reference.flat, "quantized": compiled.artifact.run}
    if against == "backend":
        target = get_backend(saved.about.backend)
        runs[against] = build(pipeline.run_pipeline(reference, make_passes(BEFORE)), target).run
    sizes = sizes_for(saved.program.io, batch, sequence, past)
    inputs = random_inputs(saved.program.io, 0, sizes)
    times = race(runs, inputs)
    result = {
        "float_seconds": times[against],
        "seconds": times["quantized"],
        "speedup": times[against] / times["quantized"],
        "sizes": sizes,
        "bytes": compiled.bytes,
        "float_bytes": compiled.float_bytes,
    }
    if json_:
        print_json(result)
        return
    words = "float" if against == "float" else f"float on {saved.about.backend}"
    out.print(
        f"{sizes or 'fixed sizes'}: {words} {times[against] * 1e3:.2f} ms, quantized "
        f"{times['quantized'] * 1e3:.2f} ms: {result['speedup']:.2f} × float speed",
        markup=False,
    )


for command in (export, generate_, plan_, *LISTS, *BACKENDS):
    main.add_command(command)

# --- helpers -----------------------------------------------------------------------------------


def _program(model: str) -> Program:
    if (Path(model) / MANIFEST).is_file():
        return read(model).program
    return open_model(model)[0]


def _open_at(text: str) -> tuple[Account, int | None]:
    """`OUT` or `OUT@3` → its history, and the step."""
    if Path(text).suffix == ".onnx":
        return Account(open_model(text)[0].history), None
    folder, mark, step = text.rpartition("@")
    if not mark:
        return Account(read(text).program.history), None
    if not step.isdigit():
        raise BadInput(f"{text!r}: a step is a number, as in {folder}@3")
    account = Account(read(folder).program.history)
    account.at(int(step))
    return account, int(step)


def _float_program(saved: Saved) -> Program:
    source = saved.about.source
    if source.kind in ("module", "exported"):
        raise BadInput(
            f"{saved.folder} was compiled from an object in Python, so the float model cannot be "
            "loaded again; compare in Python (compiled.compare(model, inputs)), or compile from a "
            "folder, a .pt2 or .onnx file, or module:factory"
        )
    try:
        return source.open()
    except BadInput as error:
        raise BadInput(f"the float model of {saved.folder} is gone: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
