"""Tagged batches: each tag counts the same, differences between tags are told, folders of tags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompiler
from qcompiler import BadInput, Program, QFormat, Tagged, capture
from qcompiler.cli import main
from qcompiler.data import read_data
from qcompiler.facts import NEEDS, Facts, measure
from qcompiler.formats import Scheme
from qcompiler.keep import Keep
from qcompiler.observers import Histogram, Range, evenly
from qcompiler.pipeline import run_pipeline
from qcompiler.registry import make_passes
from qcompiler.samples import Flat
from qcompiler.tagged import apart

STATIC = "assign{weight=int8:channel activation=int8:tensor head=same},quantize"
SMALL, LARGE = "text", "image"
Batch = Flat | Tagged[Flat]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.fixture(scope="module")
def program(model: nn.Module) -> Program:
    return capture(model, torch.randn(4, 8))


def batch(size: float, rows: int = 6, seed: int = 0) -> Tensor:
    return size * torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def mixed() -> list[Batch]:
    """Three batches of one tag, one of another, one without."""
    found: list[Batch] = [Tagged(SMALL, (batch(0.1, seed=s),)) for s in range(3)]
    return [*found, Tagged(LARGE, (batch(20.0, seed=3),)), (batch(1.0, seed=4),)]


def test_ranges_by_tag_and_of_all(program: Program) -> None:
    data = mixed()
    found = measure(program, data)
    assert set(found.by_tag) == {SMALL, LARGE, ""}
    rows = {SMALL: torch.cat([batch(0.1, seed=s) for s in range(3)]), LARGE: batch(20.0, seed=3)}
    for tag, seen in rows.items():
        first = found.by_tag[tag]["0/linear#0"]
        assert torch.equal(first.maximum, seen.amax(0)) and first.count == len(seen)
        torch.testing.assert_close(first.mean, seen.mean(0))
    whole = measure(program, [b.inputs if isinstance(b, Tagged) else b for b in data])
    assert whole.by_tag == {}
    for id, seen in whole.activations.items():
        assert torch.equal(found.activations[id].minimum, seen.minimum)
        assert torch.equal(found.activations[id].maximum, seen.maximum)
    everything = torch.cat([rows[SMALL].mean(0)[None], rows[LARGE].mean(0)[None]])
    mean = (everything.sum(0) + batch(1.0, seed=4).mean(0)) / 3
    torch.testing.assert_close(found.activations["0/linear#0"].mean, mean)


def test_a_tag_counts_the_same_however_many_batches_it_has(program: Program) -> None:
    """Nine batches of one tag and one of the other, as one of each would have it."""
    few: list[Batch] = [Tagged(SMALL, (batch(0.1),)), Tagged(LARGE, (batch(20.0),))]
    many = [*[few[0]] * 9, few[1]]
    for need in ("histograms", "activations"):
        once, often = (getattr(measure(program, data, [need]), need) for data in (few, many))
        for id, seen in once.items():
            if isinstance(seen, Histogram):
                assert torch.equal(often[id].bins, 9 * seen.bins)
            else:
                torch.testing.assert_close(often[id].square, seen.square)


def test_even_parts_keep_what_is_rare() -> None:
    rows = torch.cat([torch.ones(999, 1), torch.full((1, 1), 50.0)])
    found = evenly([Histogram.of(rows), Histogram.of(torch.zeros(10, 1))])
    values, counts = found.values()
    assert found.count == 2000 and counts.tolist() == [1000, 999, 1]
    assert float(values.max()) == pytest.approx(50, rel=0.02)


def test_one_tag_is_none(program: Program) -> None:
    """With one tag all facts are, bit for bit, what they are without."""
    plain: list[Batch] = [(batch(1.0, seed=s),) for s in range(3)]
    tagged = [Tagged("t=10", b) for b in plain]
    needs = ("activations", "samples", "histograms")
    one, other = measure(program, plain, needs), measure(program, tagged, needs)
    for need in needs:
        for id, seen in getattr(one, need).items():
            for name, value in seen.state().items():
                assert torch.equal(value, getattr(other, need)[id].state()[name])
    assert list(other.by_tag) == ["t=10"]


def test_passes_read_batches_without_tags(program: Program) -> None:
    found = measure(program, mixed(), NEEDS)
    assert len(found.batches) == 5 and all(isinstance(b, tuple) for b in found.batches)
    assert found.fisher.keys() == found.samples.keys() == found.activations.keys()


def test_goes_on_behind_the_last_batch(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off behind any batch and started again, the same to the last bit."""
    monkeypatch.setattr("qcompiler.facts.EVERY", 0.0)
    needs = ("activations", "samples", "histograms")
    data = [*mixed(), Tagged("a|b", (batch(3.0, seed=5),)), Tagged(SMALL, (batch(0.2, seed=6),))]

    def cut(length: int) -> Iterator[Batch]:
        yield from data[:length]
        raise KeyboardInterrupt

    whole = measure(program, data, needs)
    for length in range(1, len(data)):
        keep = Keep(tmp_path / str(length))
        with pytest.raises(KeyboardInterrupt):
            measure(program, cut(length), needs, keep=keep)
        again = measure(program, data, needs, keep=keep)
        assert same(whole, again)


def same(one: Facts, other: Facts) -> bool:
    tables = [(getattr(one, n), getattr(other, n)) for n in ("activations", "samples")]
    tables += [(one.histograms, other.histograms)]
    tables += [(one.by_tag[tag], other.by_tag[tag]) for tag in one.by_tag]
    return one.by_tag.keys() == other.by_tag.keys() and all(
        torch.equal(value, b[id].state()[name])
        for a, b in tables
        for id, seen in a.items()
        for name, value in seen.state().items()
    )


def test_tags_that_lie_apart_are_told(model: nn.Module) -> None:
    compiled = qcompiler.compile(
        model,
        batch(1.0),
        passes=STATIC,
        backend="reference",
        data=[Tagged(SMALL, batch(0.5)), Tagged(LARGE, batch(20.0)), Tagged(SMALL, batch(0.5))],
    )
    assigned, quantized = compiled.history[-2:]
    assert assigned.notes == () and len(quantized.notes) == 2
    note = quantized.notes[0]
    largest = float(batch(20.0).abs().max())
    ids = {note.partition(": ")[0] for note in quantized.notes}
    assert ids == {"0/linear#0", "2/linear#0"}
    assert any(f"largest input {largest:.3g} with tag image, " in n for n in quantized.notes)
    assert "with tag text: a static scale for both wastes 5." in note
    assert note.endswith("bits; make its activation dynamic")


def test_told_of_three_sites_with_static_scales_that_differ_by_four() -> None:
    def ranges(*sizes: float) -> dict[str, Range]:
        return {f"s{i}": Range.of(torch.tensor([[-n, n / 2]])) for i, n in enumerate(sizes)}

    by_tag = {"t": ranges(1, 1, 1, 1, 1, 0, 1), "": ranges(3.9, 8, 64, 32, 16, 5, 99)}
    plan = {f"s{i}": Scheme(None, QFormat.parse("int8:tensor")) for i in range(6)}
    plan["s6"] = Scheme(None, QFormat.parse("int8:token:dynamic"))
    told = apart(by_tag, plan)
    assert [note.partition(":")[0] for note in told] == ["s2", "s3", "s4"]
    assert "largest input 64 without a tag, 1 with tag t" in told[0] and "6.0 bits" in told[0]
    assert apart({"t": by_tag["t"]}, plan) == []


def test_keys_of_attention_are_told(program: Program) -> None:
    by_tag = {t: {"a:key": Range.of(torch.full((1, 2), n))} for t, n in (("x", 1.0), ("y", 8.0))}
    assert apart(by_tag, {"a": Scheme(key=QFormat.parse("int4:channel"))})[0].startswith("a:key: ")
    assert apart(by_tag, {"a": Scheme(key=QFormat.parse("int4:token:dynamic"))}) == []


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four batches of one tag, two of another, of eight rows each, and a hidden file."""
    np.save(tmp_path / "t=10.npy", np.random.default_rng(0).normal(size=(32, 8)))
    rows = torch.randn(16, 8)
    save_file({"input": rows}, tmp_path / "t=2.safetensors")
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    return tmp_path


def tags(data: object) -> list[str]:
    assert isinstance(data, list)
    return [b.tag for b in data]


def test_a_folder_is_dealt_by_turns(program: Program, folder: Path) -> None:
    one, other = "t=10", "t=2"
    assert tags(read_data(folder, program.io, None)) == [one, other, one, other, one, one]
    assert tags(read_data(folder, program.io, None, 4)) == [one, other, one, other]
    assert tags(read_data(folder, program.io, None, 3)) == [one, other, one]


def test_names_of_numpy(program: Program, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(16, 8))
    np.savez(tmp_path / "data.npz", input=rows)
    (first, second) = read_data(tmp_path / "data.npz", program.io, None)
    found = torch.cat([first["input"], second["input"]])
    assert torch.equal(found, torch.from_numpy(rows).float())


def test_a_folder_calibrates(model: nn.Module, program: Program, folder: Path) -> None:
    data = read_data(folder, program.io, None)
    feed = [Tagged(b.tag, tuple(b.inputs.values())) for b in data]  # type: ignore[attr-defined]
    wanted = run_pipeline(program, make_passes(STATIC), data=lambda: feed)
    found = qcompiler.compile(model, batch(1.0, 4), passes=STATIC, backend="reference", data=data)
    for name, value in wanted.params.items():
        assert torch.equal(value, found.program.params[name])


FACTORY = """
import torch

def net():
    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)), torch.randn(4, 8)
"""


def test_a_folder_on_the_command_line(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path_factory.mktemp("place")
    (place / "tag_factories.py").write_text(FACTORY)
    monkeypatch.chdir(place)
    np.save(folder / "far.npy", np.full((8, 8), 50, dtype="f4"))
    words = ["compile", "tag_factories:net", "-o", "out", "--recipe", "w8a8-static", "--json"]
    done = CliRunner().invoke(main, [*words, "--data", str(folder), "--batches", "3"])
    assert done.exit_code == 0, done.output
    notes = [n for step in qcompiler.load("out").history for n in step.notes]
    assert any("largest input 50 with tag far" in n for n in notes)


def test_bad_folders(
    program: Program, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(BadInput, match="holds no files"):
        read_data(empty, program.io, None)
    with pytest.raises(BadInput, match="holds 2 tags; expected at least as many batches, found 1"):
        read_data(folder, program.io, None, 1)
    with pytest.raises(BadInput, match=r"give --batches 2 or more, or .* into one \.npy"):
        read_data(folder, program.io, None, 1)
    np.save(folder / "t=0.npy", np.zeros((0, 8), dtype="f4"))
    with pytest.raises(BadInput, match=r"t=0\.npy holds no data"):
        read_data(folder, program.io, None)
    (folder / "t=0.npy").write_bytes(b"noise")
    with pytest.raises(BadInput, match=r"t=0\.npy is no \.npy array"):
        read_data(folder, program.io, None)


# --- bad input -----------------------------------------------------------------------------------


def test_messages_name_the_tag(model: nn.Module) -> None:
    def compile(*data: object) -> None:
        qcompiler.compile(model, batch(1.0), passes=STATIC, backend="reference", data=data)

    good = batch(1.0)
    with pytest.raises(BadInput, match=r"data batch 1 with tag image: .*shape \[3, 7\]"):
        compile(good, Tagged("image", torch.ones(3, 7)))
    with pytest.raises(
        BadInput, match=r"NaN or infinite values .* 0/linear#0, in data batch 1 with tag image"
    ):
        compile(good, Tagged("image", good * torch.nan))
    with pytest.raises(BadInput, match=r"found one batch\. Write data=\[batch\]"):
        qcompiler.compile(model, good, data=Tagged("image", good))
    with pytest.raises(BadInput, match="a tag is a text"):
        Tagged("", good)
    with pytest.raises(BadInput, match=r"a tag is a text .* found 10"):
        Tagged(10, good)  # type: ignore[arg-type]


def test_another_vocabulary_names_the_tag() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    ids = torch.arange(6).reshape(2, 3)
    data = [Tagged("de", ids), Tagged("fr", ids + 9)]
    with pytest.raises(BadInput, match=r"data batch 1 with tag fr: .* holds 14"):
        qcompiler.compile(model, ids, passes=STATIC, backend="reference", data=data)


def test_a_tag_without_rows(model: nn.Module) -> None:
    data = [Tagged("text", batch(1.0)), Tagged("image", batch(1.0, 0))]
    with pytest.raises(BadInput, match=r"data batch 1 with tag image: .* shape \[0, 8\]"):
        qcompiler.compile(model, batch(1.0), passes=STATIC, backend="reference", data=data)
