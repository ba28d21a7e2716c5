"""Rows, and the file that they are kept in while the others are made."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

OURS = "qcompiler"
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Row:
    """One method of one tool on one model at one format: a value, or why there is none."""

    tool: str
    model: str
    format: str
    """`float`: not quantized."""
    method: str
    rotation: str = "none"
    metric: str = ""
    value: float | None = None
    """Mean over the seeds."""
    values: tuple[float, ...] = ()
    """One for each seed."""
    extra: dict[str, object] = field(default_factory=dict)
    bits_per_weight: float | None = None
    """Of the quantized weights, with scales, zero points and whatever else stands for them."""
    model_bits: float | None = None
    """Of all parameters as they are held, over those of the float model."""
    seconds: float | None = None
    """What making the quantized model takes, capture and evaluation left out."""
    wall: float = 0.0
    """Seconds that the row took in all, for those who wait for the next."""
    pipeline: str = ""
    error: str = ""

    @property
    def key(self) -> Key:
        return self.tool, self.model, self.format, self.method, self.rotation

    @property
    def name(self) -> str:
        turned = "" if self.rotation == "none" else f", {self.rotation} rotation"
        return self.method + turned

    @property
    def spread(self) -> str:
        """Smallest … largest."""
        if len(self.values) < 2:
            return ""
        return f"{min(self.values):.4g} … {max(self.values):.4g}"

    def rank(self, higher: bool) -> float:
        """Smaller is better. Accuracies are a few images apart, which is luck (some rows are above
        float): those are told apart by the relative error of the logits."""
        assert self.value is not None
        if self.metric == "accuracy":
            return float(str(self.extra["relative_error"]))
        return -self.value if higher else self.value


class Results:
    """Rows by key, written to a file, if there is one, after every change.

    What was measured with other settings is not mixed in.
    """

    def __init__(self, file: Path | None, about: dict[str, object], again: bool) -> None:
        self.file, self.about, self.again = file, about, again
        self.peer_versions: dict[str, dict[str, str]] = {}
        self.finished: set[str] = set()
        """`tool/model/format` of peers that have nothing more to add there."""
        self._rows: dict[Key, Row] = {}
        if file is not None and file.is_file():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            known = json.loads(file.read_text())
            settings, rows = known["settings"], [Row(**r) for r in known["rows"]]
        except (ValueError, KeyError, TypeError) as error:
            why = f"{file} holds no rows of this benchmark ({error!r}); name another file"
            raise SystemExit(why) from error
        if settings != self.about["settings"]:
            raise SystemExit(
                f"{file} was measured with {settings}, this run asks for "
                f"{self.about['settings']}; name another file"
            )
        self._rows = {row.key: row for row in rows}
        self.peer_versions = known["peer_versions"]
        self.finished = set(known["finished"])

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def has(self, key: Key) -> bool:
        """Whether a row need not be made. One of ours that failed is tried again, always."""
        row = self._rows.get(key)
        return row is not None and not self.again and not (row.error and row.tool == OURS)

    def add(self, *rows: Row) -> None:
        for row in rows:
            self._rows[row.key] = row
        self.write()

    def drop(self, tool: str, model: str, formats: list[str]) -> None:
        """Forget the rows of a tool that is about to make them anew."""
        self.finished -= {f"{tool}/{model}/{f}" for f in formats}
        for key in [*self._rows]:
            if key[:2] == (tool, model) and key[2] in formats:
                del self._rows[key]

    def write(self) -> None:
        """Beside the old file and then renamed: a killed run leaves what was finished."""
        if self.file is None:
            return
        whole = self.about | {
            "peer_versions": self.peer_versions,
            "finished": sorted(self.finished),
            "rows": [asdict(row) for row in self._rows.values()],
        }
        unfinished = self.file.with_name(f".{self.file.name}.tmp")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n")
        os.replace(unfinished, self.file)

    def expected(self, key: Key) -> float | None:
        """Seconds that such a row took so far, as near as rows of ours tell; None without any."""
        _, model, _, method, rotation = key
        known = [r for r in self.rows if r.tool == OURS and r.value is not None and r.wall]
        for wanted in ((model, method, rotation), (model, method), (model,), ()):
            like = [
                r.wall for r in known if (r.model, r.method, r.rotation)[: len(wanted)] == wanted
            ]
            if like:
                return statistics.fmean(like)
        return None


def best(rows: Iterable[Row], higher: bool) -> Row | None:
    """The row of the best value, None if there is no finite one."""
    able = [row for row in rows if row.value is not None and math.isfinite(row.value)]
    return min(able, key=lambda row: row.rank(higher), default=None)
