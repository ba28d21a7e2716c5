"""The page of an artifact: whole, from disk alone, and nothing in it is taken for markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import qcompiler
from qcompiler.cli import main
from qcompiler.diff import Diff, Snapshot
from qcompiler.history import Reason, Step
from qcompiler.show.account import Account

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Cells by row, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    made = qcompiler.compile(model, torch.randn(8, 32), recipe="w8a8-dynamic")
    made.save(tmp_path / "out")
    return tmp_path / "out"


def test_it_says_what_the_account_says(artifact: Path, tmp_path: Path) -> None:
    place = tmp_path / "deep" / "page.html"
    done = CliRunner().invoke(main, ["diff", str(artifact), "--html", str(place)])
    assert done.exit_code == 0, done.output
    page = Page(place.read_text("utf-8"))
    assert not page.links
    account = Account(qcompiler.load(artifact).history)
    passes = [row[1] for row in page.rows if len(row) == 7][1:]
    assert passes == [step.spec for step in account.steps]
    quantize = account.steps[-1]
    for id, sqnr in quantize.nodes.items():
        assert [id, "quantize", f"{sqnr:.1f} dB", ""] in page.rows
    worst = [row[0] for row in page.rows if len(row) == 4 and row[1] == "quantize"]
    assert worst == sorted(quantize.nodes, key=lambda id: quantize.nodes[id])
    for id, scheme in quantize.after.plan.items():
        assert [id, scheme, "8 bits", ""] in page.rows
    for step in account.steps:
        for reason in (*step.edits, *step.skipped):
            assert [reason.nodes[0], reason.why] in page.rows


def test_which_values_lost_the_most(artifact: Path, tmp_path: Path) -> None:
    def call(*words: str) -> str:
        done = CliRunner().invoke(main, ["diff", *words])
        assert done.exit_code == 0, done.output
        return done.output

    worst = qcompiler.load(artifact).diff().worst()
    assert [*worst] == sorted(worst, key=lambda id: worst[id][0]) and "0/linear#0" in worst
    (row,) = json.loads(call(str(artifact), "--worst", "1", "--json"))["worst"]
    assert row["sqnr_db"] == min(sqnr for sqnr, _ in worst.values())
    assert f"{row['sqnr_db']:.1f} dB" in call(str(artifact), "--worst", "1")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    passes = "assign{weight=int2:channel},quantize"
    qcompiler.compile(model, torch.randn(8, 32), passes=passes).save(tmp_path / "low")
    both = call(str(artifact), str(tmp_path / "low"), "--worst", "5", "--json")
    (row,) = [r for r in json.loads(both)["worst"] if r["node"] == "0/linear#0"]
    assert row["second_sqnr_db"] < 20 < row["sqnr_db"]
    refused = CliRunner().invoke(main, ["diff", f"{artifact}@1", "--worst", "5"])
    assert refused.exit_code == 2 and "--worst takes one artifact or two" in refused.output


def test_nothing_is_markup() -> None:
    bad = '<script>alert("x")</script> & <b>'
    step = Step(
        name="p", spec=bad, effect=None, diff=Diff(added=(bad,), precision={bad: bad}),
        after=Snapshot({}, {}, {bad: "weight=int4:channel activation=float"}),
        edits=(Reason(bad, (bad,)),), skipped=(Reason(bad, ()),), nodes={bad: float("inf")},
        notes=(bad,),
    )  # fmt: skip
    text = Account((step,)).html(bad)
    assert "alert(" in text and text.count("<script>") == 1 and "<b>" not in text
    assert [bad, bad] in Page(text).rows


def test_one_artifact_at_a_time(artifact: Path) -> None:
    out = str(artifact)
    for words in ([f"{out}@1"], [out, out], [out, "--json"], [out, "--why", "0/linear#0"]):
        done = CliRunner().invoke(main, ["diff", *words, "--html", "page.html"])
        assert done.exit_code == 2 and "the whole of one artifact" in " ".join(done.output.split())


def test_a_place_that_cannot_be_written(artifact: Path) -> None:
    inside = artifact / "qcompiler.json" / "page.html"
    for place, why in ((artifact, "cannot be written"), (inside, "qcompiler.json is a file")):
        done = CliRunner().invoke(main, ["diff", str(artifact), "--html", str(place)])
        assert done.exit_code == 2 and why in done.output
    assert not list(artifact.parent.rglob("*.part"))
