"""What a program carries from call to call: appended to in place, never changed."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompiler
from qcompiler.append import LEAST, append
from qcompiler.backends.cpu.fixed import REPEATED, Open, Repeated, fixed, symbols
from qcompiler.backends.cpu.kernels import GENERATED
from qcompiler.check import relative_error

pytestmark = pytest.mark.skipif(not GENERATED, reason="llvmlite is not installed")
MODEL = Path(__file__).parents[2] / "examples/tiny_llama/model"


def rows(start: int, end: int) -> Tensor:
    return torch.arange(start, end).float().reshape(1, 1, -1, 1).expand(2, 3, -1, 4)


def grown(count: int = 5) -> Tensor:
    return append(rows(0, 0), rows(0, count), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_it_grows_in_place_and_is_cat(dtype: torch.dtype) -> None:
    past = rows(0, 0).to(dtype)
    seen, places = [], set()
    for end in range(1, 3 * LEAST):
        past = append(past, rows(end - 1, end).to(dtype), 2)
        assert past.dtype == dtype and torch.equal(past, rows(0, end).to(dtype))
        seen.append(past)
        places.add(past.data_ptr())
    assert all(torch.equal(p, rows(0, n + 1).to(dtype)) for n, p in enumerate(seen))
    assert len(places) <= 4


def test_another_axis_and_several_at_once() -> None:
    x = torch.randn(2, 5)
    found = append(append(x, x[:, :2], 1), x[:, :3], 1)
    assert torch.equal(found, torch.cat([x, x[:, :2], x[:, :3]], 1))


def test_going_on_twice_and_going_back_change_nothing() -> None:
    past = grown()
    one, two = append(past, rows(5, 6), 2), append(past, rows(80, 81), 2)
    assert torch.equal(one, rows(0, 6))
    assert torch.equal(two, torch.cat([rows(0, 5), rows(80, 81)], 2))
    back = append(one[:, :, :3], rows(90, 91), 2)
    assert torch.equal(one, rows(0, 6)) and torch.equal(back[:, :, 3:], rows(90, 91))
    behind = append(one[:, :, 1:], rows(70, 71), 2)
    assert torch.equal(behind, torch.cat([rows(1, 6), rows(70, 71)], 2))
    assert torch.equal(append(one[:1], rows(60, 61)[:1], 2)[..., 5, 0], torch.full((1, 3), 5.0))
    assert torch.equal(one, rows(0, 6)) and torch.equal(past, rows(0, 5))


def test_what_was_handed_in_is_not_ours_to_write_in() -> None:
    memory = torch.zeros(2, 3, 100, 4)
    found = append(memory[:, :, :5], rows(5, 6), 2)
    assert not memory.any() and torch.equal(found[:, :, 5:], rows(5, 6))


def test_what_does_not_fit_is_an_error_as_in_cat() -> None:
    past = grown()
    for new in (rows(5, 6)[:1], rows(5, 6)[..., :2]):
        with pytest.raises(RuntimeError, match="must match"):
            append(past, new, 2)
    assert torch.equal(append(past, rows(5, 6), 2), rows(0, 6))


def test_memory_is_not_taken_for_that_of_another_axis_or_type() -> None:
    past = append(torch.randn(2, 5, 4, 8), torch.randn(2, 5, 1, 8), 2)
    kept = past.clone()
    new = torch.full((1, 1, 5, 8), 7.0)
    assert torch.equal(append(past[:1], new, 1), torch.cat([kept[:1], new], 1))
    whole = torch.full((2, 1, 5, 8), 7.0)
    assert torch.equal(append(past, whole, 1), torch.cat([kept, whole], 1))
    assert torch.equal(past, kept)
    found = append(past.half(), torch.randn(2, 5, 1, 8), 2)
    assert found.dtype == torch.float32  # as cat has it


def test_what_was_made_in_inference_mode_goes_on_outside() -> None:
    with torch.inference_mode():
        past = append(grown(), rows(5, 6), 2)
        past = append(past, rows(6, 7), 2)
    one = append(past, rows(7, 8), 2)
    assert torch.equal(append(one, rows(8, 9), 2), rows(0, 9))
    with torch.inference_mode():
        assert torch.equal(append(one, rows(8, 9), 2), rows(0, 9))


class Promoted(torch.nn.Module):
    """Appends to numbers of another type."""

    def forward(self, past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], 2)


def test_another_type_is_appended_as_torch_does() -> None:
    past, new = torch.randn(2, 3, 4, 8).half(), torch.randn(2, 3, 1, 8)
    dynamic = {"past": {2: "past"}}
    made = qcompiler.compile(
        Promoted(), (past, new), passes="canonicalize{optional=true}", dynamic=dynamic
    )
    assert torch.equal(made(past, new), torch.cat([past, new], 2))


CACHE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[B, 2, S, 4] new, float[B, 2, P, 4] past) => (float[B, 2, T, 4] present) {
present = Concat <axis = 2> (past, new) }"""


def test_the_cache_of_an_onnx_file(tmp_path: Path) -> None:
    """Its inputs have names that are no Python names of nodes."""
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "cache.onnx"
    onnx.save(onnx.parser.parse_model(CACHE), path)
    made = qcompiler.compile(path, passes="canonicalize{optional=true}", backend="cpu")
    assert made.program.io.dims["P"] == (0, None)
    for length in (6, 2, 0):
        new, past = torch.randn(1, 2, 3, 4), torch.randn(1, 2, length, 4)
        found = made(new=new, past=past)["present"]
        assert torch.equal(found, torch.cat([past, new], 2))
        more = made(new=new, past=found)["present"]
        assert torch.equal(more, torch.cat([past, new, new], 2))


def test_what_only_joins_its_input_is_left_alone() -> None:
    past, new = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8)
    for dynamic in (False, {"past": {0: "batch"}, "new": {0: "batch"}}):
        passes = "canonicalize{optional=true}"
        made = qcompiler.compile(Promoted(), (past, new), passes=passes, dynamic=dynamic)
        assert made(past, new).is_contiguous()


def test_only_one_of_many_threads_takes_the_room() -> None:
    past = grown()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: append(past, rows(n, n + 1), 2), range(64)))
    assert all(
        torch.equal(f, torch.cat([rows(0, 5), rows(n, n + 1)], 2)) for n, f in enumerate(found)
    )


def test_saved_and_loaded_it_grows_again() -> None:
    file = io.BytesIO()
    torch.save(grown(), file)
    file.seek(0)
    assert torch.equal(append(torch.load(file), rows(5, 6), 2), rows(0, 6))


@pytest.fixture(scope="module")
def cached() -> qcompiler.Compiled:
    return qcompiler.compile(MODEL, recipe="w8a8-dynamic", cache=True)


def test_a_step_does_not_copy_its_cache(cached: qcompiler.Compiled) -> None:
    assert cached.lowered is not None
    targets = [n.target for n in cached.lowered.program.nodes]
    assert targets.count(torch.ops.qc_cpu.append.default) == 8
    past, own, places = None, None, set()
    ids = torch.randint(0, 900, (1, 12), generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 3), *((n, n + 1) for n in range(3, 12))):
        found = cached(ids[:, start:end], past_key_values=past)
        want = cached.program(ids[:, start:end], past_key_values=own)
        assert relative_error(want.logits, found.logits) < 1e-2
        past, own = found.past_key_values, want.past_key_values
        places.add(past[0][0].data_ptr())
    assert len(places) == 1


def test_the_module_of_it_returns_nothing_that_it_read(cached: qcompiler.Compiled) -> None:
    module = cached.module()
    ids = torch.tensor([[3, 5]])
    past = cached(ids).past_key_values
    found = module(input_ids=ids, past_key_values=past).past_key_values
    assert found[0][0].data_ptr() != past[0][0].data_ptr()
    torch.testing.assert_close(found, cached(ids, past_key_values=past).past_key_values)


def test_what_repeats_is_settled_while_the_past_grows(cached: qcompiler.Compiled) -> None:
    artifact = cached.artifact
    artifact.__setstate__(artifact.__getstate__())  # as if nothing had run yet
    ids = torch.randint(0, 900, (1, 24), generator=torch.Generator().manual_seed(2))
    past, own = None, None
    for start, end in ((0, 5), *((n, n + 1) for n in range(5, 24))):
        found = cached(ids[:, start:end], past_key_values=past)
        want = cached.program(ids[:, start:end], past_key_values=own)
        assert relative_error(want.logits, found.logits) < 1e-2
        past, own = found.past_key_values, want.past_key_values
    (pattern,) = artifact._own.fixed._made
    assert sorted(map(str, pattern)) == ["1", "1", "None"]
    (settled,) = artifact._own.fixed._made.values()
    assert len(settled.lines) < len(artifact._own.settled.lines)


def test_nothing_is_settled_where_no_product_would_be(cached: qcompiler.Compiled) -> None:
    artifact = cached.artifact
    artifact.__setstate__(artifact.__getstate__())
    for length in range(3, 3 + 2 * REPEATED):
        cached(torch.ones(2, length, dtype=torch.long))
    assert not artifact._own.fixed._made


def test_patterns() -> None:
    made = Repeated[str]()
    assert [made.due((1, 1, n)) for n in range(REPEATED - 1)] == [None] * (REPEATED - 1)
    assert made.due((1, 1, 9)) == (1, 1, None)
    made.put((1, 1, None), "open")
    assert made.get((1, 1, 77)) == "open" and made.get((2, 1, 77)) is None
    assert made.due((1, 1, 9)) is None  # one has come twice: the next call may settle it
    assert made.due((1, 1, 9)) == (1, 1, 9)
    made.put((1, 1, 9), "whole")
    assert made.get((1, 1, 9)) == "whole" and made.get((1, 1, 8)) == "open"
    assert made.due((1, 1, 9)) is None


def test_what_depends_on_an_open_size_stays_open(cached: qcompiler.Compiled) -> None:
    program = cached.program
    ids = torch.tensor([[3]])
    inputs = program.io.flatten((ids,), {"past_key_values": cached(ids).past_key_values})
    open_ = Open(program)
    assert sorted(open_.sizes(inputs)) == [1, 1, 1] and len(open_) == 3
    past = symbols(program.inputs[1].meta["val"].shape[2])
    made = fixed(program, inputs, past)
    for before, after in zip(program.inputs, made.inputs, strict=True):
        found = symbols(before.meta["val"])
        assert symbols(after.meta["val"]) == (found if found & past else set())
    assert any(symbols(n.meta.get("val")) for n in made.nodes)
    assert not any(symbols(n.meta.get("val")) for n in fixed(program, inputs).nodes)
    assert made.flat(inputs)[0].shape == (1, 1, 1024)
