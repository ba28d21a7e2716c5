"""Capture: equal to the source, at other sizes too, and clear about what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qcompiler
from qcompiler import BadInput, Program
from qcompiler.check import relative_error
from qcompiler.codec import decode_program, encode_program
from qcompiler.errors import BackendError
from qcompiler.io import as_call
from qcompiler.recurrent import KEY, recurrent_shapes

Captured = Callable[..., tuple[nn.Module, object, Program]]


def outputs(run: Callable[..., object], inputs: object) -> list[torch.Tensor]:
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(t, torch.Tensor)]


def first_tensors(model: nn.Module, inputs: object, count: int) -> list[torch.Tensor]:
    """The source model's outputs; a cache, which the program leaves out, comes after them."""
    return outputs(model, inputs)[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_equal_to_the_source(name: str, dtype: torch.dtype, captured: Captured) -> None:
    model, example, program = captured(name, dtype)
    for inputs in (example, other_sizes(example)):
        got = outputs(program, inputs)
        want = first_tensors(model, inputs, len(got))
        for a, b in zip(want, got, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(b, a, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def other_sizes(inputs: object) -> object:
    """Another batch, and another length where there is a sequence."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, x[:2]])
        return torch.cat([x, x[:, :4]], 1) if x.ndim == 2 else x

    return pytree.tree_map_only(torch.Tensor, change, inputs)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_parameters_keep_their_names(name: str, captured: Captured) -> None:
    model, _, program = captured(name)
    known = {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    assert set(program.params) <= known
    trained = [n for n, p in model.named_parameters() if p.ndim > 1]
    assert set(trained) <= set(program.params)
    assert all(not getattr(n.target, "_schema", None) or not n.target._schema.is_mutable
               for n in program.nodes if n.op == "call_function")  # fmt: skip


@pytest.mark.parametrize(("name", "table"), [("gpt2", "wte"), ("opt", "embed_tokens")])
def test_tied_weights_are_one_parameter(name: str, table: str, captured: Captured) -> None:
    program = captured(name)[2]
    assert "lm_head.weight" not in program.params
    node = next(n for n in program.nodes if (program.param_of(n) or "").endswith(f"{table}.weight"))
    assert len(node.users) == 2


def test_the_module_is_left_as_it_was() -> None:
    model, example = zoo.build("cnn")
    model.train()
    model.fc.weight.requires_grad_(False)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    qcompiler.capture(model, example)
    assert model.training and model.bn.training
    assert model.stem.weight.requires_grad and not model.fc.weight.requires_grad
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


class Lazy(nn.Module):
    """Makes a table in its first forward, and keeps what it last saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.table = torch.arange(64.0)[:, None]
        if "row" not in self.cache:
            self.cache["row"] = torch.arange(6.0)
        self.last = self.layer(x)
        return self.last + self.table[: x.shape[1]] * self.cache["row"]


def test_attributes_of_forward_are_left_as_they_were() -> None:
    """torch.export's tensors without values would stay in the user's module."""
    model, example = Lazy(), torch.randn(2, 8, 6)
    before = set(vars(model))
    for _ in range(2):  # once without them, once with its own
        program = qcompiler.capture(model, example)
        assert set(vars(model)) == before and all(
            type(x) is Tensor for x in [*model.cache.values(), *vars(model).values()]
            if isinstance(x, Tensor)
        )  # fmt: skip
        torch.testing.assert_close(program(example), model(example))
        before = set(vars(model))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


def test_state_is_refused() -> None:
    with pytest.raises(BadInput, match=r"writes into 'count'.*without state"):
        qcompiler.capture(Counter(), torch.ones(2, 3))


def test_data_dependent_branch_is_refused() -> None:
    with pytest.raises(BadInput, match=r"branches on the values of a tensor.*torch.where"):
        qcompiler.capture(Branch(), torch.ones(2, 3))


def test_nan_in_weights_is_refused() -> None:
    model = nn.Linear(4, 4)
    model.weight.data[1, 2] = float("nan")
    with pytest.raises(BadInput, match=r"'weight' has 1 NaN or infinite values of 16"):
        qcompiler.capture(model, torch.ones(2, 4))


def test_inputs_are_checked(captured: Captured) -> None:
    _, example, program = captured("bert")
    ids, mask = example["input_ids"], example["attention_mask"]
    assert len(outputs(program, (ids, mask))) == 2  # by position, as the model allows
    for bad, words in (
        ({"attention_mask": mask}, "found attention_mask"),
        ({**example, "labels": ids}, "labels"),
        ({"input_ids": ids.float(), "attention_mask": mask}, "found torch.float32"),
        ({"input_ids": ids[0], "attention_mask": mask}, r"does not take shape \[11\]"),
        ({"input_ids": ids[:, :5], "attention_mask": mask}, "sequence = 5"),
        ({"input_ids": "text", "attention_mask": mask}, "found str"),
    ):
        with pytest.raises(BadInput, match=words):
            program(**bad)


def test_an_argument_that_changes_nothing_may_be_left_out(tmp_path: Path) -> None:
    """A mask of ones, token types of zeros: what no argument means is measured, not assumed."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.types = nn.Embedding(50, 8), nn.Embedding(2, 8)

        def forward(
            self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None,
            scale: Tensor | None = None,
        ) -> Tensor:  # fmt: skip
            x = self.table(ids) + self.types(torch.zeros_like(ids) if types is None else types)
            x = x if mask is None else x * mask[..., None]
            return x if scale is None else x * (scale + 1)

    module = Masked()
    ids = torch.randint(0, 50, (2, 7))
    example = {"ids": ids, "mask": ids % 2, "types": ids % 2, "scale": torch.tensor(2.0)}
    made = qcompiler.compile(module, example, passes="canonicalize", backend="reference")
    assert made.program.io.fills == {"mask": 1, "types": 0, "scale": 0}
    made.save(tmp_path / "out")
    ids = torch.randint(0, 50, (3, 5))
    for program in (made, qcompiler.load(tmp_path / "out")):
        torch.testing.assert_close(program(ids), module(ids))
        torch.testing.assert_close(program(ids, types=ids % 2), module(ids, types=ids % 2))
    with pytest.raises(BadInput, match="more was not in the example inputs"):
        made(ids=ids, more=ids)
    with pytest.raises(BadInput, match=r"mask: int64\[batch, sequence\] does not take .*batch = 3"):
        made(ids, ids[:1])


class Positions(nn.Module):
    """What no positions mean depends on the length: 0 in the first step of decoding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(50, 8), nn.Embedding(64, 8)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        places = torch.arange(ids.shape[1])[None] if positions is None else positions
        out: Tensor = self.table(ids) + self.places(places)
        return out


class Mean(nn.Module):
    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return x.mean(0) if weights is None else (x * weights[:, None]).sum(0)


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (Positions(), {"ids": torch.ones(2, 1, dtype=torch.long)}),
        (Mean(), {"x": torch.randn(1, 8), "weights": torch.ones(1)}),
    ],
)
def test_what_is_so_by_chance_is_no_rule(module: nn.Module, example: dict[str, Tensor]) -> None:
    if "ids" in example:
        example["positions"] = torch.zeros(2, 1, dtype=torch.long)
    assert qcompiler.capture(module, example).io.fills == {}


class Looked(nn.Module):
    """Positions from a table of 8, and some that must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.register_buffer("some", torch.tensor([0, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table(torch.arange(x.shape[1])))[:, self.some]


@pytest.mark.parametrize("dynamic", [None, {"x": {0: "batch", 1: "sequence"}}])
def test_bounds_of_a_size_are_found(dynamic: dict[str, dict[int, str]] | None) -> None:
    module = Looked()
    program = qcompiler.capture(module, torch.randn(2, 6, 4), dynamic=dynamic)
    assert program.io.dims["batch"] == (1, None) and program.io.dims["sequence"][1] == 8
    for length in (5, 8):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(program(x), module(x))
    with pytest.raises(BadInput, match=r"sequence is . to 8"):
        program(torch.randn(3, 9, 4))


class Written(nn.Module):
    """`b` may be as long as `a`, or shorter."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a.index_copy(1, torch.arange(b.shape[1]), b)


class Families(nn.Module):
    def forward(self, q: Tensor, docs: Tensor, w: Tensor) -> Tensor:
        out: Tensor = q @ (docs[torch.arange(w.shape[0])] * w[:, None]).T
        return out


def test_sizes_that_happen_to_be_equal_stay_apart() -> None:
    module, a, b = Written(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    program = qcompiler.capture(module, (a, b))
    assert program(a, b[:, :3]).shape == (2, 5, 8)
    program = qcompiler.capture(Families(), (torch.randn(2, 8), torch.randn(2, 8), torch.randn(2)))
    assert [p.shape[0] for p in program.io.ports] == ["batch", "batch2", "batch2"]


class Rows(nn.Module):
    """Reads as many rows of a mask as there are texts, as transformers does."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask[torch.arange(x.shape[0])]


def test_a_mask_has_a_row_for_each_text() -> None:
    """With more rows it would run, the rest unseen."""
    x = torch.randn(2, 6)
    program = qcompiler.capture(Rows(), (x, torch.ones(2, 6)))
    assert {p.shape for p in program.io.ports} == {("batch", 6)}


class Halved(nn.Module):
    """An image that is halved twice and put together again, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(8, 8, 2, 2) for _ in range(2))
        self.last = nn.Conv2d(11, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        half = self.down[0](x)
        half = half + self.up[0](self.down[1](half))
        out: Tensor = self.last(torch.cat([self.up[1](half), x], 1))
        return out


def test_what_a_size_is_a_multiple_of_is_found(tmp_path: Path) -> None:
    module, example = Halved().eval(), torch.randn(2, 3, 24, 32)
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    passes = "assign{weight=int8:channel head=same},quantize"
    made = qcompiler.compile(module, example, dynamic=axes, passes=passes)
    assert made.program.io.steps == {"height": 4, "width": 4}
    made.save(tmp_path / "out")
    x = torch.randn(1, 3, 40, 20)
    for program in (made, qcompiler.load(tmp_path / "out")):
        assert relative_error(module(x), program(x)) < 0.05
        with pytest.raises(BadInput, match=r"height is 1 to any, a multiple of 4.*height = 18"):
            program(torch.randn(1, 3, 18, 20))


def test_a_sequence_with_its_channels_first() -> None:
    """Audio, or spectra: the last axis is the one that may be of any length."""
    for channels in (1, 6):
        module = nn.Sequential(nn.Conv1d(channels, 4, 5, 2), nn.ReLU(), nn.Conv1d(4, 2, 3))
        program = qcompiler.capture(module, torch.randn(1, channels, 50))
        assert program.io.ports[0].shape == ("batch", channels, "sequence")
        x = torch.randn(3, channels, 71)
        torch.testing.assert_close(program(x), module(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerDecoder(layer, 1)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = self.layers(x, memory, tgt_mask=mask)
        return out


def test_torchs_decoder_with_a_mask(capfd: pytest.CaptureFixture[str]) -> None:
    """It looks at the mask's values to learn whether it is causal, which no export can."""
    module = Decoder().eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    program = qcompiler.capture(module, (torch.randn(2, 5, 16), torch.randn(2, 7, 16), mask))
    inputs = torch.randn(3, 5, 16), torch.randn(3, 9, 16), mask
    torch.testing.assert_close(program(*inputs), module(*inputs))
    assert "forward(" not in capfd.readouterr().err


def test_a_size_that_the_model_fixes_is_named() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(BadInput, match=r"Constraints violated \(t\)!; it suggests t = 12;"):
        qcompiler.capture(module, torch.randn(2, 12, 4), dynamic={"input": {1: "t"}})


class Stepped(nn.Module):
    """A recurrent layer by hand: a loop over the length, which is thereby a number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t]) + self.state(h))
        return h


class Rooted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) / math.sqrt(x.shape[1])
        return out


@pytest.mark.parametrize("module", [Stepped(), Rooted()])
def test_a_size_that_becomes_a_number_is_fixed(module: nn.Module) -> None:
    program = qcompiler.capture(module, torch.randn(2, 8, 6))
    assert program.io.ports[0].shape == ("batch", 8, 6) and [*program.io.dims] == ["batch"]
    assert "sequence stays 8 (axis 1 of x): what the model" in program.history[0].notes[0]
    x = torch.randn(5, 8, 6)
    torch.testing.assert_close(program(x), module(x))
    with pytest.raises(BadInput, match=r"does not take shape \[2, 12, 6\]"):
        program(torch.randn(2, 12, 6))
    with pytest.raises(BadInput, match=r"Constraints violated \(s\)!; it suggests s = 8"):
        qcompiler.capture(module, torch.randn(2, 8, 6), dynamic={"x": {0: "b", 1: "s"}})


class Best(nn.Module):
    """A share of the tokens: torch.export makes a number of what Python computes with floats."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).topk(int(x.shape[1] * 0.1), 1)[0]
        return out


class Smaller(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        size = int(x.shape[2] * 0.5), x.shape[3]
        return nn.functional.interpolate(x, size=size)


def test_a_number_computed_from_a_size_fixes_it(tmp_path: Path) -> None:
    """The program runs at other lengths, even at those that random inputs have, and is wrong."""
    module, example = Best(), torch.randn(2, 16, 6)
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(module, (example,), dynamic_shapes=(auto,))
    torch.export.save(exported, tmp_path / "best.pt2")
    for source in (module, exported, tmp_path / "best.pt2"):
        program = qcompiler.capture(source, example)
        assert program.io.ports[0].shape == ("batch", 16, 6)
        assert "sequence stays 16 (axis 1 of x): a number" in program.history[0].notes[0]
        x = torch.randn(5, 16, 6)
        torch.testing.assert_close(program(x), module(x))
    wanted = r"fixes: h stays 8 \(axis 2 of x\): a number .* an output has shape .*, the module's"
    with pytest.raises(BadInput, match=wanted):
        axes = {"x": {0: "b", 2: "h", 3: "w"}}
        qcompiler.capture(Smaller(), torch.randn(2, 3, 8, 8), dynamic=axes)


class Otherwise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.abs() if torch.compiler.is_exporting() else x * x


def test_what_is_right_for_the_example_alone_is_told() -> None:
    with pytest.warns(UserWarning, match="on other numbers than the example's"):
        program = qcompiler.capture(Otherwise(), torch.tensor([[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]]))
    assert "does not do what the module does" in program.history[0].notes[-1]
    assert [*program.io.dims] == ["batch"]  # which is not to blame


def test_dynamic_said_exactly() -> None:
    model = nn.Linear(4, 3)
    fixed = qcompiler.capture(model, torch.ones(2, 4), dynamic=False)
    with pytest.raises(BadInput, match="does not take shape"):
        fixed(torch.ones(3, 4))
    named = qcompiler.capture(model, torch.ones(2, 4), dynamic={"input": {0: "rows"}})
    assert named(torch.ones(7, 4)).shape == (7, 3)
    with pytest.raises(BadInput, match="dynamic names"):
        qcompiler.capture(model, torch.ones(2, 4), dynamic={"inputs": {0: "rows"}})


def test_exported_file(tmp_path: Path, captured: Captured) -> None:
    model, example, program = captured("cnn")
    torch.export.save(torch.export.export(model.eval(), (example,)), tmp_path / "cnn.pt2")
    again = qcompiler.capture(tmp_path / "cnn.pt2")
    torch.testing.assert_close(again(example), program(example), rtol=0, atol=1e-6)


def test_a_cache_that_grows() -> None:
    """A step of decoding: the axes of an argument are those of each tensor in it."""
    from transformers import DynamicCache

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = zoo.build("llama")[0]

        def forward(
            self, ids: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
        ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
            cache = DynamicCache()
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                cache.update(key, value, layer)
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            layers = out.past_key_values.layers
            return out.logits, [c.keys for c in layers], [c.values for c in layers]

    def inputs(past: int) -> tuple[object, ...]:
        cache = [[torch.randn(1, 2, past, 12) for _ in range(2)] for _ in range(2)]
        return torch.randint(0, 100, (1, 1)), *cache

    model = Step().eval()
    past = {2: "past"}
    program = qcompiler.capture(model, inputs(5), dynamic={"keys": past, "values": past})
    for length in (5, 9):
        given = inputs(length)
        (logits, keys, values), want = program(*given), model(*given)
        torch.testing.assert_close(logits, want[0], rtol=1e-4, atol=1e-5)
        assert keys[1].shape[2] == values[1].shape[2] == length + 1
    with pytest.raises(qcompiler.BadInput, match="values_0: float32"):
        ids, keys, values = inputs(5)
        program(ids, keys, [v[:, :, :3] for v in values])


@pytest.mark.parametrize("name", ["gpt2", "t5", "whisper", "bart"])
def test_folders_bring_their_own_example(name: str, tmp_path: Path) -> None:
    """A decoder without a mask, so that it can have a cache; encoders with what decoders read."""
    import transformers

    small = {
        "gpt2": ("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 2}),
        "t5": (
            "T5ForConditionalGeneration",
            {
                "vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1,
                "num_heads": 2,
            },
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            {
                "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48, "num_mel_bins": 8, "max_source_positions": 20,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
        ),
    }  # fmt: skip
    small["bart"] = (  # it makes the decoder's input itself
        "BartForSequenceClassification",
        {
            "vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 1, "max_position_embeddings": 64,
        },
    )  # fmt: skip
    kind, sizes = small[name]
    config = transformers.AutoConfig.for_model(name, **sizes)
    config.architectures = [kind]
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    program = qcompiler.capture(tmp_path, cache=name == "gpt2")
    names = [p.name for p in program.io.tensors]
    wanted = {
        "gpt2": ["input_ids", "past_key_values_0_0", "past_key_values_0_1"],
        "t5": ["input_ids", "attention_mask", "decoder_input_ids"],
        "whisper": ["input_features", "decoder_input_ids"],
        "bart": ["input_ids", "attention_mask"],
    }
    assert names == wanted[name]


class Recurrent(nn.Module):
    """Layers that read a sequence step by step, and what reshapes their outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layers = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
        more = {"proj_size": 4} if kind == "lstm" else {}
        self.layer = layers[kind](6, 8, num_layers=2, batch_first=True, bidirectional=True, **more)
        self.head = nn.Linear(4 if kind == "lstm" else 8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.layer(x)
        y = y.reshape(y.shape[0], y.shape[1], 2, -1)
        return self.head(y), state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
def test_recurrent_layers_leave_lengths_open(kind: str, tmp_path: Path) -> None:
    model = Recurrent(kind).eval()
    program = qcompiler.capture(model, torch.randn(3, 7, 6))
    assert program.io.ports[0].shape == ("batch", "sequence", 6)
    shapes = [n.meta["val"].shape for n in program.graph.output_node().all_input_nodes]
    assert [[isinstance(d, int) for d in s] for s in shapes] == [
        [False, False, True, True],
        [True, False, True],
    ]
    passes = "canonicalize{optional=true},assign{weight=int8:channel head=same},quantize"
    compiled = qcompiler.compile(model, torch.randn(3, 7, 6), passes=passes)
    with pytest.raises(BackendError, match=f"{kind}.* any length.* a fixed length .dynamic=False"):
        compiled.export(tmp_path / "model.onnx")
    for batch, length in ((1, 1), (4, 20)):
        x = torch.randn(batch, length, 6)
        with torch.no_grad():
            wanted = model(x)
        for found, want in zip(program(x), wanted, strict=True):
            torch.testing.assert_close(found, want)
        assert relative_error(list(wanted), list(compiled(x))) < 0.02


def test_shapes_without_steps_are_for_the_capture_alone() -> None:
    """Captures overlap, also in other threads, and leave torch as it was."""
    operator = torch.ops.aten.lstm.input
    was = operator.py_kernels[KEY]
    first, second, third = Event(), Event(), Event()

    def other() -> None:
        with recurrent_shapes():
            first.set()
            assert second.wait(60)
        third.set()

    model = nn.LSTM(4, 5)
    x = torch.randn(3, 2, 4)
    thread = Thread(target=other)
    thread.start()
    assert first.wait(60)
    exported = torch.export.export(model, (x,)).run_decompositions()
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x)[0], model(x)[0])
    with recurrent_shapes():
        second.set()
        assert third.wait(60)
        assert operator.py_kernels[KEY] is not was
    thread.join()
    assert operator.py_kernels[KEY] is was


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0, shift: float | None = None) -> Tensor:
        return self.layer(x) * scale + (shift or 0.0)


def test_a_constant_that_is_not_the_default_is_named_in_a_call() -> None:
    model, x = Scaled(), torch.randn(3, 8)
    program = qcompiler.capture(model, {"x": x, "scale": 2.0, "shift": 1.0})
    torch.testing.assert_close(program(x, scale=2.0), model(x, 2.0, 1.0))
    with pytest.raises(BadInput, match=r"captured with scale=2\.0, .* call it with scale=2\.0"):
        program(x)
    again = decode_program(encode_program(program), program.params)
    with pytest.raises(BadInput, match=r"captured with scale=2\.0"):
        again(x)
    plain = qcompiler.capture(model, {"x": x, "scale": 1.0})
    torch.testing.assert_close(plain(x), model(x))


Found = namedtuple("Found", "boxes scores")


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.scores = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Found:
        return Found(self.boxes(x), self.scores(x))


def test_what_cannot_be_saved_or_copied_says_so(tmp_path: Path) -> None:
    compiled = qcompiler.compile(
        Detector(), torch.randn(3, 8), passes="canonicalize{optional=true}"
    )
    assert compiled(torch.randn(2, 8)).scores.shape == (2, 2)
    with pytest.raises(BadInput, match=r"the model returns .*Found, .* a tuple or a dict"):
        compiled.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(BadInput, match="save it"):
            copied(compiled)


class Sum(nn.Module):
    """Any number of inputs, behind one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.layer(x + sum(more))


def test_any_number_of_inputs() -> None:
    model, x = Sum(), torch.randn(3, 8)
    program = qcompiler.capture(model, (x, x, x))
    assert [p.name for p in program.io.tensors] == ["x", "more_0", "more_1"]
    given = tuple(torch.randn(3, 5, 8))
    torch.testing.assert_close(program(*given), model(*given))


class Scratch(nn.Module):
    """A buffer that each call writes whole before it reads it."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        for name, value in (("near", 1.0), ("far", 2.0), ("held", 3.0)):
            self.register_buffer(name, torch.full((6,), value))

    def forward(self, x: Tensor) -> Tensor:
        before = self.held.clone() if self.first else 0
        self.held.copy_(torch.where(x.amax() > 1, self.far, self.near))
        return x * self.held + before


def test_a_buffer_that_is_written_before_it_is_read_is_no_state() -> None:
    module = Scratch(first=False)
    program = qcompiler.capture(module, torch.randn(3, 6))
    assert "held" not in program.params
    for x in (torch.zeros(2, 6), torch.full((5, 6), 2.0)):
        torch.testing.assert_close(program(x), module(x))
    with pytest.raises(BadInput, match="writes into 'held'"):
        qcompiler.capture(Scratch(first=True), torch.randn(3, 6))


class OfTheBatch(nn.Module):
    """Normalized by the batch's own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, training=True)


def test_a_program_does_not_write_into_running_statistics() -> None:
    module, x = OfTheBatch(), torch.randn(5, 6)
    program = qcompiler.capture(module, torch.randn(3, 6))
    before = module.norm.running_mean.clone()
    found = program(x)
    assert torch.equal(module.norm.running_mean, before)
    torch.testing.assert_close(found, module(x))


class Filled(nn.Module):
    """A buffer that is written at the first call, or where the length is another than before."""

    def __init__(self, by_length: bool) -> None:
        super().__init__()
        self.by_length, self.length = by_length, 0
        self.register_buffer("table", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.length != (x.shape[1] if self.by_length else 1):
            self.length = x.shape[1] if self.by_length else 1
            self.table.copy_(torch.arange(6.0) / x.shape[1] if self.by_length else x.amax((0, 1)))
        return x * self.table


def test_a_buffer_that_only_some_calls_write() -> None:
    module = Filled(by_length=True)
    program = qcompiler.capture(module, torch.randn(3, 5, 6))
    for x in (torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.randn(2, 8, 6)):
        torch.testing.assert_close(program(x), module(x))
    with pytest.raises(BadInput, match="what an earlier call has written into a buffer"):
        qcompiler.capture(Filled(by_length=False), torch.randn(3, 5, 6))


class Writes(nn.Module):
    """Writes into its own weight, or into one of two buffers that share memory."""

    def __init__(self, weight: bool) -> None:
        super().__init__()
        self.weight = weight
        self.layer = nn.Linear(6, 6)
        self.register_buffer("a", torch.ones(6))
        self.register_buffer("b", self.a[:3])

    def forward(self, x: Tensor) -> Tensor:
        if self.weight:
            self.layer.weight.copy_(x.amax(0).expand(6, 6))
        else:
            self.a.copy_(x.amax(0))
        return self.layer(x) + self.b.sum()


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "shared"])
def test_what_a_model_writes_into_is_refused(weight: bool) -> None:
    said = "writes into 'layer.weight'" if weight else "writes into a buffer"
    with pytest.raises(BadInput, match=said):
        qcompiler.capture(Writes(weight), torch.randn(3, 6))


class Hidden(nn.Module):
    """Attention behind a mask that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind()
        mask = mask[:, None] if mask.ndim == 3 else mask
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("lead", [(), (3,), (3, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_a_mask_has_the_sequence_twice(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    module = Hidden().eval()
    mask = torch.ones(*lead, 11, 11).tril().to(dtype)
    program = qcompiler.capture(module, (torch.randn(3, 11, 16), mask))
    assert set(program.io.dims) == {"batch", "sequence"}
    assert not program.history[0].notes
    for length in (7, 20):
        x, mask = torch.randn(3, length, 16), torch.ones(*lead, length, length).tril().to(dtype)
        torch.testing.assert_close(program(x, mask), module(x, mask))


def test_a_part_that_keeps_a_cache_when_the_model_does_not() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    module, ids = T5ForConditionalGeneration(config).eval(), torch.randint(1, 60, (3, 11))
    module.config.use_cache = False
    program = qcompiler.capture(module, {"input_ids": ids, "decoder_input_ids": ids[:, :7]})
    assert [p.name for p in program.io.tensors] == ["input_ids", "decoder_input_ids"]


class Audio(nn.Module):
    """Strided convolutions over samples (batch, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 10, stride=5)
        self.second = nn.Conv1d(4, 6, 3, stride=2)

    def forward(self, samples: Tensor) -> Tensor:
        return self.second(self.first(samples[:, None]).relu())


def test_a_named_length_that_torch_would_have_as_a_multiple() -> None:
    module = Audio().eval()
    program = qcompiler.capture(module, torch.randn(2, 440), dynamic={"samples": {0: "b", 1: "t"}})
    assert set(program.io.dims) == {"b", "t"}
    for length in (440, 333, 1001):
        x = torch.randn(3, length)
        torch.testing.assert_close(program(x), module(x))


class Named(nn.Module):
    """What is handed on by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return self.layer(x) * more["scale"] + more.get("more", 0)


def test_an_argument_called_like_the_rest_of_them() -> None:
    module = Named().eval()
    given = {name: torch.randn(3, 4) for name in ("more", "scale")} | {"x": torch.randn(3, 6)}
    assert torch.equal(qcompiler.capture(module, given)(**given), module(**given))


def test_arguments_by_name() -> None:
    module = Named().eval()
    program = qcompiler.capture(module, {"x": torch.randn(3, 6), "scale": torch.randn(3, 4)})
    assert [p.name for p in program.io.tensors] == ["x", "scale"]
    assert program.io.dims == {"batch": (1, None)}
    given = {"x": torch.randn(5, 6), "scale": torch.randn(5, 4)}
    assert torch.equal(program(**given), module(**given))
    assert "forward" not in vars(module)


class Apart(nn.Module):
    def forward(self, x: Tensor, y: Tensor, more: dict[str, Tensor]) -> Tensor:
        return x - 2 * y + 3 * more["z"]


def test_one_tensor_for_several_inputs_is_several_inputs() -> None:
    """As queries, keys and values of attention often are in an example."""
    x, model = torch.randn(3, 8), Apart()
    program = qcompiler.capture(model, (x, x, {"z": x}))
    given = (x, x + 1, {"z": x + 2})
    torch.testing.assert_close(program(*given), model(*given))
    assert program.io.dims.keys() == {"batch"}


class Table:
    """Of positions, made when it is first read."""

    def __init__(self) -> None:
        self.made: torch.Tensor | None = None

    def rows(self, count: int) -> torch.Tensor:
        if self.made is None:
            self.made = torch.arange(64.0)[:, None]
        return self.made[:count]


class Holds(torch.nn.Module):
    """Has what its forward makes in `held`: in dictionaries of each other, or an object."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.linear, self.held = torch.nn.Linear(8, 8), held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.held, Table):
            return self.linear(x) + self.held.rows(x.shape[1])
        inner = next(iter(self.held.values()))
        if "made" not in inner:
            inner["made"] = torch.arange(64.0)[:, None]
        return self.linear(x) + inner["made"][: x.shape[1]]


@pytest.mark.parametrize("held", [Table(), {"a": {}}, {"a": OrderedDict()}])
def test_what_a_forward_makes_deeper_in_a_module_does_not_stay(held: object) -> None:
    module, x = Holds(held), torch.randn(2, 6, 8)
    program = qcompiler.capture(module, x)
    assert program.io.ports[0].shape == ("batch", "sequence", 8)
    assert type(module(x)) is torch.Tensor
    torch.testing.assert_close(program(x), module(x))


@lru_cache
def _table() -> torch.Tensor:
    return torch.arange(64.0)[:, None]


def test_a_module_that_torch_export_has_broken_is_no_measure() -> None:
    class Cached(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + _table()[: x.shape[1]]

    _table.cache_clear()
    try:
        assert qcompiler.capture(Cached(), torch.randn(2, 6, 8)).io.ports[0].shape[1] == "sequence"
    finally:
        _table.cache_clear()


def test_guards_that_leave_out_single_sizes_fix_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 4, 1)).eval()
    auto = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    exported = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=(auto,))
    program = qcompiler.capture(exported)
    assert program.io.ports[0].shape == ("batch", 3, "dim2", "dim3")
    x = torch.randn(3, 3, 5, 7)
    torch.testing.assert_close(program(x), model(x))


def test_a_traced_part_and_a_max_norm_that_is_no_embeddings_are_captured() -> None:
    x = torch.randn(2, 6, 8)
    model = nn.Sequential(torch.jit.trace(nn.Linear(8, 8), x), nn.ReLU())
    model.max_norm = 1.0
    program, more = qcompiler.capture(model, x), torch.randn(3, 9, 8)
    torch.testing.assert_close(program(more), model(more))


def test_a_module_under_torch_compile_is_not_compiled() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    compiled: list[torch.fx.GraphModule] = []
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), backend=backend)
    qcompiler.capture(model, torch.randn(2, 6, 8))
    assert not compiled
    model(torch.randn(2, 6, 8))
    assert compiled


def test_a_size_is_held_against_the_module_where_the_example_is_as_large_as_may_be() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.rows[: x.shape[1]]) * int(0.5 * x.shape[1])

    program = qcompiler.capture(Table(), torch.randn(2, 16, 8))
    assert program.io.ports[0].shape == ("batch", 16, 8)
