"""Caches that lie in memory as int8, and look like float32."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn

import qcompiler
from qcompiler.backends.cpu.kernels import GENERATED
from qcompiler.check import relative_error
from qcompiler.errors import BadInput

pytestmark = pytest.mark.skipif(not GENERATED, reason="llvmlite is not installed")
if GENERATED:
    from qcompiler.append import append
    from qcompiler.backends.cpu import generated
    from qcompiler.backends.cpu.coded import FORMAT, append_rows
    from qcompiler.coded import Coded, numbers

MODEL = Path(__file__).parents[2] / "examples/tiny_llama/model"
BEFORE = "canonicalize{optional=true},fold{optional=true},assign{weight=int8:channel},quantize"


def rounded(x: Tensor) -> Tensor:
    made: Tensor = torch.ops.qc.fake_quantize(x, FORMAT)
    return made


def coded(x: Tensor) -> Tensor:
    return append_rows(x[:, :, :0], x, 2)


def hard() -> Tensor:
    """Rows of zeros, of denormals, of one huge number, and ordinary ones."""
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 1] = 0
    x[0, 1] *= 1e-39
    x[1, 2, 3, 7] = 1e6
    return x


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rows_are_rounded_as_the_program_does(layout: str) -> None:
    x = hard() if layout == "contiguous" else hard().transpose(1, 2).contiguous().transpose(1, 2)
    found = coded(x)
    assert isinstance(found, Coded) and found.codes.dtype == torch.int8
    assert found.codes.nbytes + found.scales.nbytes < x.nbytes / 3.7
    assert torch.equal(numbers(found), rounded(x))


def test_anything_done_to_it_is_done_to_its_numbers() -> None:
    x = hard()
    found, want = coded(x), rounded(x)
    assert found.shape == want.shape and found.dtype == torch.float32 and len(found) == 2
    for change in (
        lambda v: v + 1,
        lambda v: v[:, 1:, :2],
        lambda v: v.index_select(0, torch.tensor([1, 1])),
        lambda v: torch.cat([v, v], 2),
        lambda v: v.clone(),
        lambda v: v.transpose(1, 2) @ torch.ones(64, 2),
        copy.deepcopy,
    ):
        made = change(found)
        assert not isinstance(made, Coded) and torch.equal(made, change(want))
    assert found.tolist() == want.tolist() and (found.numpy() == want.numpy()).all()
    assert torch.equal(want, found)
    assert repr(found).startswith("Coded([2, 3, 5, 64], ")
    file = io.BytesIO()
    torch.save({"past": found}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["past"], want)


def test_it_grows_in_place_and_keeps_what_was() -> None:
    x = hard()
    past = coded(x[:, :, :2])
    one = append_rows(past, x[:, :, 2:3], 2)
    two = append_rows(one, x[:, :, 3:], 2)
    other = append_rows(past, 2 * x[:, :, 2:3], 2)
    assert isinstance(two, Coded) and two.codes.data_ptr() == past.codes.data_ptr()
    assert torch.equal(numbers(two), rounded(x))
    assert torch.equal(numbers(past), rounded(x)[:, :, :2])
    assert torch.equal(numbers(other)[:, :, 2:], rounded(2 * x[:, :, 2:3]))
    given = append_rows(x[:, :, :2], x[:, :, 2:], 2)  # numbers that nobody rounded
    assert not isinstance(given, Coded)
    assert torch.equal(given, torch.cat([x[:, :, :2], rounded(x[:, :, 2:])], 2))
    assert torch.equal(append(two, x, 2), torch.cat([rounded(x), x], 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "keys", "width"),
    [(1, 16, 8, 1, 129, 64), (2, 3, 3, 3, 7, 32), (1, 8, 2, 4, 40, 128), (2, 6, 2, 9, 9, 64)],
)
def test_attention_reads_codes(
    masked: bool, batch: int, heads: int, groups: int, tokens: int, keys: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, tokens, heads, width, generator=generator).transpose(1, 2)
    k, v = torch.randn(2, batch, groups, keys, width, generator=generator)
    mask = torch.rand(batch, 1, tokens, keys, generator=generator) > 0.4 if masked else None
    want = nn.functional.scaled_dot_product_attention(
        q.double(), rounded(k).double(), rounded(v).double(), mask, scale=0.2, enable_gqa=True
    )
    for keys_, values in ((coded(k), coded(v)), (coded(k), rounded(v)), (rounded(k), coded(v))):
        got = generated.attend(q, keys_, values, mask, 0.2, False)
        assert (got - want).norm() / want.norm() < 1e-6


def test_a_program_with_a_rounded_cache_hands_out_codes(tmp_path: Path) -> None:
    plain = qcompiler.compile(MODEL, passes=BEFORE, cache=True)
    made = qcompiler.compile(MODEL, passes=f"{BEFORE},round_cache", cache=True)
    edits = [e for e in made.history[-1].edits if "each row of what is kept" in e.why]
    assert len(edits) == 8
    ids = torch.randint(0, 900, (2, 14), generator=torch.Generator().manual_seed(0))
    past, own, free, far = None, None, None, 0.0
    for start, end in ((0, 6), *((n, n + 1) for n in range(6, 14))):
        found = made(ids[:, start:end], past_key_values=past)
        want = made.program(ids[:, start:end], past_key_values=own)
        assert isinstance(found.past_key_values[0][0], Coded)
        assert relative_error(want.logits, found.logits) < 2e-3
        past, own = found.past_key_values, want.past_key_values
        exact = plain(ids[:, start:end], past_key_values=free)
        free = exact.past_key_values
        far = max(far, relative_error(exact.logits, found.logits))
    assert 0 < far < 5e-2
    assert made.program(ids[:, :1], past_key_values=past).logits.shape == (2, 1, 1024)
    loaded = qcompiler.load(made.save(tmp_path / "out"))
    assert torch.equal(loaded.generate(ids, count=5), made.generate(ids, count=5))


def test_codes_of_another_format_are_numbers() -> None:
    """A cache that another backend rounded to e4m3."""
    x = torch.randn(1, 2, 7, 32)
    scales = x.abs().amax(-1) / 448
    codes = (x / scales[..., None]).to(torch.float8_e4m3fn).view(torch.uint8)
    other = Coded(codes, scales)
    past = append_rows(other, x[:, :, :1], 2)
    want = torch.cat([numbers(other), rounded(x[:, :, :1])], 2)
    assert not isinstance(past, Coded) and torch.equal(past, want)
    q = torch.randn(1, 2, 1, 32)
    got = generated.attend(q, other, coded(x), None, 0.2, False)
    want = nn.functional.scaled_dot_product_attention(q, numbers(other), rounded(x), scale=0.2)
    torch.testing.assert_close(got, want)


def test_refused_with_a_reason() -> None:
    module, example = zoo.build("llama")
    with pytest.raises(BadInput, match="no input of the program grows"):
        qcompiler.compile(module, example, passes="canonicalize,round_cache")
    for format in ("int8:token", "int8:tensor:dynamic"):
        with pytest.raises(BadInput, match="expected a dynamic format by tokens or groups"):
            qcompiler.compile(
                module, example, passes=f"canonicalize,round_cache{{format={format}}}", cache=True
            )


def test_it_is_not_written_to_in_place() -> None:
    found, want = coded(hard()), rounded(hard())
    for change in (
        lambda x: x.zero_(),
        lambda x: x.mul_(2),
        lambda x: x.copy_(torch.ones(())),
        lambda x: x.__setitem__(0, 0.0),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch._foreach_add_([x], 1.0),
    ):
        with pytest.raises(BadInput, match="cannot be written to in place"):
            change(found)
    assert torch.equal(numbers(found), want)
    assert torch.equal(torch.zeros_like(want).copy_(found), want)


def test_narrow_heads_and_other_formats_stay_numbers() -> None:
    module, example = zoo.build("llama")  # heads of 12
    for format in ("int8:token:dynamic", "int4:token:dynamic"):
        made = qcompiler.compile(
            module, example, passes=f"canonicalize,round_cache{{format={format}}}", cache=True
        )
        ids = torch.tensor([[3, 5, 9]])
        found = made(ids[:, 2:], past_key_values=made(ids[:, :2]).past_key_values)
        own = made.program(ids[:, :2]).past_key_values
        want = made.program(ids[:, 2:], past_key_values=own)
        assert not isinstance(found.past_key_values[0][0], Coded)
        assert relative_error(want.logits, found.logits) < 1e-4
