"""Fused calls of the cpu backend against the reference, and what is left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

import qcompiler
from qcompiler.backends.cpu import fuse
from qcompiler.backends.cpu.kernels import GENERATED, KERNELS, Static, self_test
from qcompiler.check import relative_error
from qcompiler.formats import QFormat
from qcompiler.rounding import nearest
from qcompiler.samples import random_inputs

pytestmark = pytest.mark.skipif(not GENERATED, reason="llvmlite is not installed")
LINEAR = "qc_cpu.linear.default"
W4A8 = "assign{weight=int4:group32:mirrored activation=int8:token:dynamic},quantize"


def operators(compiled: qcompiler.Compiled) -> Counter[str]:
    assert compiled.lowered is not None
    return Counter(str(n.target) for n in compiled.lowered.program.graph.nodes)


def compiled_for(name: str, formats: str = W4A8) -> qcompiler.Compiled:
    module, example = zoo.build(name)
    backend = qcompiler.registry.get_backend("cpu").only("integer", "decoding")
    passes = f"canonicalize,fold{{optional=true}},{formats}"
    return qcompiler.compile(module, example, passes=passes, backend=backend)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("formats", [W4A8, "assign{weight=int8:channel},quantize"])
def test_a_fused_program_is_the_reference(name: str, formats: str) -> None:
    compiled = compiled_for(name, formats)
    exact = "activation" not in formats
    for seed in (3, 4):
        inputs = random_inputs(compiled.program.io, seed)
        want, got = compiled.program.flat(inputs), compiled.artifact.run(inputs)
        assert relative_error(want, got) < (2e-5 if exact else 2e-2)


def test_what_a_llama_becomes() -> None:
    """Two norms, four products, two rotations a layer; nothing else that computes but attention."""
    found = operators(compiled_for("llama"))
    layers = found["qc_cpu.rope.default"] // 2
    assert layers and found[LINEAR] == 4 * layers
    for gone in ("aten.silu.default", "qc.rope.default", "qc.fake_quantize.default"):
        assert not found[gone], gone
    assert found["aten.rms_norm.default"] == 1  # before the head, which stays in floating point
    assert not found["aten.add.Tensor"]


@pytest.mark.parametrize("activation", ["float", "int8:token:dynamic"])
@pytest.mark.parametrize("before", ["rms_norm", "layer_norm", "silu_mul", "gelu", "gelu_tanh"])
def test_what_stands_before(before: str, activation: str) -> None:
    """Rows of odd lengths, cut out of a larger tensor, with numbers from tiny to large."""
    generator = torch.Generator().manual_seed(0)
    q = nearest(torch.randn(40, 77, generator=generator), QFormat.parse("int4:group32"))
    fmt = None if activation == "float" else QFormat.parse(activation)
    call = KERNELS["decoding" if fmt is None else "integer"].prepare(q, None, fmt, Static())
    wide = torch.randn(2, 5, 154, generator=generator) * torch.logspace(-6, 2, 5).reshape(1, 5, 1)
    x, other = wide[..., :77], wide[..., 77:]
    gain, shift = torch.randn(2, 77, generator=generator)
    residual = torch.randn(2, 5, 80, generator=generator)[..., 40:]
    functional = nn.functional
    want = {
        "rms_norm": lambda: functional.rms_norm(x, (77,), gain, 1e-5),
        "layer_norm": lambda: functional.layer_norm(x, (77,), gain, shift, 1e-5),
        "silu_mul": lambda: functional.silu(x) * other,
        "gelu": lambda: functional.gelu(x),
        "gelu_tanh": lambda: functional.gelu(x, approximate="tanh"),
    }[before]()
    text = f"{before}:1e-05" if "norm" in before else before
    more = {"other": other} if before == "silu_mul" else {}
    got = call.operator(
        x, *call.parameters.values(), *call.constants,
        before=text, gain=gain, shift=shift, residual=residual, **more,
    )  # fmt: skip
    # Each token by itself: a large one must not hide a small one's error.
    off = (got - call(want) - residual).norm(dim=-1) / (call(want) + residual).norm(dim=-1)
    assert off.max() < (1e-5 if fmt is None else 1e-2)


class Shared(nn.Module):
    """A norm and a linear with a second reader, and a sum that is broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = self.one(y) + self.scale
        return self.two(z) + y + z.mean()


def test_what_others_read_stays() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(3, 64)
    backend = qcompiler.registry.get_backend("cpu").only("integer")
    passes = "canonicalize{optional=true}," + W4A8.replace("activation", "head=same activation")
    compiled = qcompiler.compile(model, x, passes=passes, backend=backend)
    found = operators(compiled)
    assert found["aten.rms_norm.default"] == 1 and found[LINEAR] == 2
    assert relative_error(compiled.program.flat((x,)), compiled.artifact.run((x,))) < 1e-2


def test_different_formats_are_not_merged() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, n) for n in (32, 9, 24))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.a(x), self.b(x), self.c(x)

    torch.manual_seed(0)
    model, x = Two().eval(), torch.randn(3, 64)
    backend = qcompiler.registry.get_backend("cpu").only("integer")
    options = "weight=int4:group32 activation=int8:token:dynamic head=same"
    exceptions = 'exceptions=["a/*=int8:channel/int8:token:dynamic"]'
    passes = f"canonicalize{{optional=true}},assign{{{options} {exceptions}}},quantize"
    compiled = qcompiler.compile(model, x, passes=passes, backend=backend)
    assert operators(compiled)[LINEAR] == 2
    assert set(compiled.kernels) == {"a/linear#0", "b/linear#0", "c/linear#0"}
    torch.testing.assert_close(compiled(x), compiled.program(x), rtol=1e-5, atol=1e-5)


def test_a_wrong_fusion_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check behind each pass sees it, here a wrong ε; the rest of the program stays fused."""
    module, example = zoo.build("llama")
    for name, value in module.named_parameters():
        if "norm" in name:
            value.data.uniform_(0.5, 2)
    found = fuse._before

    def wrong(edit, x):
        made = found(edit, x)
        norm = made and made[0].name == "rms_norm"
        return (replace(made[0], number=1.0), *made[1:]) if norm else made

    monkeypatch.setattr(fuse, "_before", wrong)
    backend = qcompiler.registry.get_backend("cpu").only("integer")
    passes = f"canonicalize,fold{{optional=true}},{W4A8}"
    made = qcompiler.compile(module, example, passes=passes, backend=backend)
    assert len(made.notes) == 4 and "off the reference" in made.notes[0]
    assert operators(made)["aten.rms_norm.default"] == 5
    chains = [n.kwargs.get("before") for n in linears(made)]
    assert chains.count("silu_mul") == 2
    inputs = random_inputs(made.program.io, 3)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) < 2e-2


def linears(made: qcompiler.Compiled) -> list[torch.fx.Node]:
    assert made.lowered is not None
    return made.lowered.program.graph.find_nodes(op="call_function", target=fuse.LINEAR)


class Rare(nn.Module):
    """What the fusions must leave alone."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 9)
        self.register_buffer("whole", torch.arange(64))
        self.register_buffer("gain", torch.randn(64))
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.function(self, x) if y is None else self.function(self, x, y)


def _half(m: Rare, x: torch.Tensor) -> torch.Tensor:
    q = m.one(x).unflatten(-1, (2, 32)).transpose(1, 2).half()
    return nn.functional.scaled_dot_product_attention(q, q, q).float()


def _shared(m: Rare, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    q = m.one(x).unflatten(-1, (2, 32)).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(q, k, k)


def _flat(m: Rare, x: torch.Tensor) -> torch.Tensor:
    q = m.one(x).unflatten(-1, (2, 32)).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(q, q, q, scale=0.0)


RARE = {
    "a scale of nothing": (_flat, [(2, 2, 64)]),
    "half attention": (_half, [(2, 2, 64)]),
    "keys shared by a batch": (_shared, [(3, 2, 64), (1, 2, 5, 32)]),
    "whole numbers as a gain": (lambda m, x: m.one(x * m.whole), [(4, 64)]),
    "a broadcast value": (lambda m, x: m.one(x * m.gain), [(4, 1)]),
    "an input as a gain": (
        lambda m, x, g: m.one(nn.functional.rms_norm(x, (64,), m.gain, 1e-5) * g),
        [(4, 64), (64,)],
    ),
    "an odd residual": (lambda m, x, r: m.two(x) + r, [(4, 64), (4, 9)]),
    "rows of a part": (lambda m, x: m.one(x[:, :, :4]), [(3, 1, 10, 64)]),
    "a residual of a part": (
        lambda m, x, r: m.one(x) + r[:, :, :4],
        [(3, 1, 4, 64), (3, 1, 9, 64)],
    ),
}


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("dynamic", [None, False])
def test_rare_cases(name: str, dynamic: object) -> None:
    function, shapes = RARE[name]
    generator = torch.Generator().manual_seed(1)
    inputs = tuple(torch.randn(s, generator=generator) for s in shapes)
    backend = qcompiler.registry.get_backend("cpu").only("integer", "decoding")
    passes = "canonicalize{optional=true},assign{weight=int8:channel head=same},quantize"
    made = qcompiler.compile(
        Rare(function).eval(), inputs, passes=passes, backend=backend, dynamic=dynamic
    )
    torch.testing.assert_close(made(*inputs), made.program(*inputs), rtol=1e-3, atol=1e-3)


def test_an_axis_that_is_one_only_when_it_runs() -> None:
    backend = qcompiler.registry.get_backend("cpu").only("decoding")
    passes = "canonicalize{optional=true},assign{weight=int8:channel head=same},quantize"
    model = Rare(lambda m, x: m.one(x[:, :, :4])).eval()
    made = qcompiler.compile(
        model, torch.randn(3, 5, 10, 64), passes=passes, backend=backend, dynamic={"x": {1: "rows"}}
    )
    for size in (5, 1):
        x = torch.randn(3, size, 10, 64)
        torch.testing.assert_close(made(x), made.program(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "tokens", "keys", "width"),
    [(1, 16, 8, 1, 129, 64), (2, 4, 4, 3, 7, 32), (1, 8, 2, 4, 40, 128), (2, 4, 2, 9, 9, 12)],
)
def test_attention(
    mask: str, batch: int, heads: int, groups: int, tokens: int, keys: int, width: int
) -> None:
    """Few queries by the generated kernel, many by torch's; transposed and broadcast operands."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, tokens, heads, width, generator=generator).transpose(1, 2)
    k = torch.randn(batch, groups, keys, width, generator=generator)
    v = torch.randn(batch, keys, groups, width, generator=generator).transpose(1, 2)
    seen = torch.rand(batch, 1, tokens, keys, generator=generator) > 0.4
    given = {"bool": seen, "float": seen.float()}.get(mask)
    got = torch.ops.qc_cpu.attend(q, k, v, given, 0.2, mask == "causal")
    wide = None if given is None else given.double() if mask == "float" else given
    want = nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), wide, scale=0.2, is_causal=mask == "causal",
        enable_gqa=True,
    )  # fmt: skip
    assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize(
    "kind", ["causal", "window", "hidden rows", "each its own", "one for all keys"]
)
def test_a_prompt_reads_what_it_may_see(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler.backends.cpu import prompt

    monkeypatch.setattr(prompt, "BLOCK", 8)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 21, 64, generator=generator)
    k, v = torch.randn(2, 2, 2, 30, 64, generator=generator)
    places = torch.arange(9, 30)[:, None] - torch.arange(30)
    mask = (places >= 0)[None, None].expand(2, 1, -1, -1)
    if kind == "window":
        mask = mask & (places < 4)
    elif kind == "hidden rows":
        mask = mask & (places < 40)
        mask[:, :, 7:18] = False  # a whole block, and parts of others
    elif kind == "each its own":
        mask = torch.rand(2, 4, 21, 30, generator=generator) > 0.8
    elif kind == "one for all keys":
        mask = torch.ones(2, 1, 21, 1, dtype=torch.bool)
        mask[:, :, 3] = False
    asked = []
    real = prompt.scaled_dot_product_attention
    monkeypatch.setattr(
        prompt, "scaled_dot_product_attention",
        lambda q, k, *rest, **more: asked.append(k.shape[2]) or real(q, k, *rest, **more),
    )  # fmt: skip
    got = torch.ops.qc_cpu.attend(q, k, v, mask, 0.2, False)
    want = real(q, k, v, mask, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(got, want, equal_nan=True)
    sizes = {"causal": [17, 25, 30], "window": [11, 11, 8], "hidden rows": [16, 1, 30]}
    assert asked == sizes.get(kind, asked) and len(asked) == (1 if "all" in kind else 3)


@pytest.mark.parametrize(
    ("n", "core"),
    [
        *((4, 1), (8, 1), (64, 1), (1024, 1), (4096, 1), (11, 11), (12, 3), (22, 11)),
        *((160, 10), (288, 18), (344, 43), (2816, 11), (11520, 90)),
    ],
)
def test_hadamard(n: int, core: int) -> None:
    """Powers of two, and such times a core; behind a gate, too."""
    generator = torch.Generator().manual_seed(0)
    q = nearest(torch.eye(n), QFormat.parse("int8:channel"))
    call = KERNELS["decoding"].prepare(q, None, None, Static())
    x, other = torch.randn(2, 3, n, generator=generator)
    for before, source in (("", x), ("silu_mul|", nn.functional.silu(x) * other)):
        got = call.operator(
            x, *call.parameters.values(), *call.constants,
            before=f"{before}hadamard:{n}:{core}", other=other,
        )  # fmt: skip
        want = torch.ops.qc.hadamard(source.double(), core)
        assert (got - want).norm() / want.norm() < 1e-6


def test_online_rotations_are_part_of_the_rounding() -> None:
    module, example = zoo.build("llama")
    backend = qcompiler.registry.get_backend("cpu").only("integer")
    passes = f"canonicalize,rotate{{online=true}},fold{{optional=true}},{W4A8}"
    made = qcompiler.compile(module, example, passes=passes, backend=backend)
    chains = [n.kwargs.get("before", "") for n in linears(made)]
    assert sum("silu_mul|times|hadamard:80:10" in c for c in chains) == 2
    assert sum(c == "rms_norm:1e-06|hadamard:48:3" for c in chains) == 4
    assert not any("hadamard" in str(n.args[0].target) for n in linears(made))
    inputs = random_inputs(made.program.io, 3)
    assert relative_error(made.program.flat(inputs), made.artifact.run(inputs)) < 2e-2


def test_attention_to_nothing_and_to_nan() -> None:
    q, k, v = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
    hidden = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(torch.ops.qc_cpu.attend(q, k, v, hidden, 0.1, False), torch.zeros_like(q))
    k[0, 1, 3, 7] = torch.nan
    got = torch.ops.qc_cpu.attend(q, k, v, None, 0.1, False)
    assert got[0, 0].isfinite().all() and got[0, 1].isnan().all()


def test_no_memory_to_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*arguments: object) -> object:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 PB")

    assert self_test("integer") is None  # it is only asked once
    monkeypatch.setitem(KERNELS, "integer", replace(KERNELS["integer"], prepare=prepare))
    module, example = zoo.build("llama")
    backend = qcompiler.registry.get_backend("cpu").only("integer")
    with pytest.raises(
        qcompiler.QCompilerError, match=r"no memory to pack the weight of model\.lay"
    ):
        qcompiler.compile(module, example, passes=f"canonicalize,{W4A8}", backend=backend)


def test_rope_in_any_memory_order() -> None:
    """x with gaps between its numbers, and one cosine for all channels."""
    x = torch.randn(2, 3, 5, 16)[..., ::2]
    cos, sin = torch.randn(2, 1, 1, 5, 1)
    want = torch.ops.qc.rope(x, cos.expand(1, 1, 5, 8), sin.expand(1, 1, 5, 8))
    torch.testing.assert_close(torch.ops.qc_cpu.rope(x, cos, sin), want)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [True, False])
def test_what_stays_float_is_torchs(kind: type[nn.GRU | nn.LSTM], batch_first: bool) -> None:
    """Of rows that do not lie side by side, too."""

    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(16, 3)
            self.cells = kind(8, 8, 2, batch_first=batch_first, bidirectional=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.cells(self.first(x.transpose(1, 2)))[0])
            return y

    torch.manual_seed(0)
    module, x = Sequences().eval(), torch.randn(4, 6, 5)
    made = qcompiler.compile(module, x, passes="assign{weight=int8:channel},quantize")
    assert relative_error(made.program.flat((x,))[0], made(x)) < 1e-5
    assert relative_error(module(x), made(x)) < 0.02
    (why,) = [w for _, _, w in made.diff().why(f"cells/{kind.__name__.lower()}#0")]
    assert "stays in floating point, with a weight of" in why
