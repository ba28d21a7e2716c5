"""The peers' rows: one process for each peer and model, on the same inputs, read from files.

`peers/common.py` says what its script prints; `peers/environment.py` makes what it runs in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peers.environment import ENVIRONMENTS, Unavailable, python_of, script_of
from safetensors.torch import save_file

from .cases import Batch, Case
from .rows import Results, Row

NAMES = tuple(ENVIRONMENTS)


def run_peer(
    name: str, case: Case, formats: list[str], seeds: int, slow: bool, results: Results
) -> None:
    """Add the peer's rows at `formats`, those left out that an earlier run finished."""
    threads = torch.get_num_threads()
    marks = {f: f"{name}/{case.name}/{f}" for f in formats}
    wanted = [f for f in formats if results.again or marks[f] not in results.finished]
    if not wanted:
        return
    print(f"{name} on {case.name}, {', '.join(wanted)} …", file=sys.stderr)
    results.drop(name, case.name, wanted)
    try:
        python = python_of(name)
    except Unavailable as error:
        results.add(*(Row(name, case.name, f, "all", error=str(error)) for f in wanted))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_data(case, Path(folder))
        answer = Path(folder) / "answer.json"
        command = [python, script_of(name), case.folder, folder, "--kind", case.kind]
        command += ["--formats", ",".join(wanted), "--seeds", seeds, "--threads", threads]
        command += ["--slow"] if slow else []
        with (
            answer.open("w") as stdout,
            subprocess.Popen(
                [*map(str, command)], stdout=stdout, stderr=subprocess.PIPE, text=True
            ) as process,
        ):
            assert process.stderr is not None
            for record in _records(process.stderr):
                # A script goes from format to format: what stands before this one is finished.
                done = wanted[: wanted.index(record["format"])]
                results.finished |= {marks[f] for f in done}
                results.add(_row(name, case, record))
        whole = json.loads(answer.read_text() or "{}")
    if code := process.returncode:
        why = f"{script_of(name).name} ended with {code}; what it said stands above"
        missing = [f for f in wanted if marks[f] not in results.finished]
        results.add(*(Row(name, case.name, f, "rest", error=why) for f in missing))
        return
    results.peer_versions[name] = whole["versions"]
    results.finished |= {marks[f] for f in wanted}
    results.add(*(_row(name, case, record) for record in whole["rows"]))


def _records(lines: Iterator[str]) -> Iterator[dict]:
    """Rows among the lines of stderr; whatever else the peer says is passed on."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and {"format", "method"} <= record.keys():
            yield record
            figure = record.get("error") or f"{record['value']:.4f}"
            line = f"    {record['format']} {record['method']}: {figure}\n"
        sys.stderr.write(line)


def _row(name: str, case: Case, record: dict) -> Row:
    extra = dict(record.get("extra", {}))
    values = extra.pop("values", None) or [v for v in [record.get("value")] if v is not None]
    return Row(
        *(name, case.name, record["format"], record["method"]),
        metric=case.metric,
        value=record.get("value"),
        values=tuple(values),
        model_bits=extra.pop("model_bits_per_weight", None),
        extra=extra,
        bits_per_weight=record.get("bits_per_weight"),
        seconds=record.get("seconds"),
        error=record.get("error", ""),
    )


def write_data(case: Case, folder: Path) -> None:
    """Calibration and held-out inputs by name, with labels where there are some."""
    for name, batches in (("calibration", case.calibration), ("heldout", case.heldout)):
        whole = _joined(batches)
        if name == "heldout" and case.labels is not None:
            whole["labels"] = case.labels
        save_file(whole, folder / f"{name}.safetensors")


def _joined(batches: list[Batch]) -> Batch:
    return {key: torch.cat([b[key] for b in batches]).contiguous() for key in batches[0]}
