"""Programs whose cache is an argument, and the text that they write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from click.testing import CliRunner
from torch import Tensor
from transformers import AutoModelForCausalLM

import qcompiler
from qcompiler.append import append
from qcompiler.cli import main
from qcompiler.errors import BadInput
from qcompiler.generation import generate
from qcompiler.padding import Padding
from qcompiler.run import evaluate_wide
from qcompiler.samples import random_inputs
from qcompiler.states import begins_empty, growing, states

MODEL = Path(__file__).parents[1] / "examples/tiny_llama/model"
PIECES = ((0, 4), (4, 5), (5, 6), (6, 11))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "opt"])
def test_pieces_are_the_whole(name: str) -> None:
    module, example = zoo.build(name)
    program = qcompiler.capture(module, example, cache=True)
    assert program.io.dims["past"] == (0, None)
    assert len(list(states(program))) == len(program.io.ports) - 1
    ids = torch.randint(0, 40, (3, 11), generator=torch.Generator().manual_seed(1))
    past, logits = None, []
    for start, end in PIECES:
        out = program(ids[:, start:end], past_key_values=past)
        past = out.past_key_values
        logits.append(out.logits)
    assert past[0][0].shape[2] == 11
    with torch.no_grad():
        whole = module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_states_grow_in_place(name: str) -> None:
    """The same numbers, in memory that stays; the program itself still joins."""
    made = qcompiler.compile(
        *zoo.build(name), passes="canonicalize", backend="reference", cache=True
    )
    program, grows = made.program, growing(made.program)
    ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    past, places = None, []
    for start, end in PIECES:
        wanted = program(ids[:, start:end], past_key_values=past)
        found = grows(ids[:, start:end], past_key_values=past)
        assert torch.equal(found.logits, wanted.logits)
        past = found.past_key_values
        for grown, joined in zip(past, wanted.past_key_values, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(grown, joined, strict=True))
        places.append([t.data_ptr() for layer in past for t in layer])
    assert len({*map(tuple, places)}) == 1 and len({*places[0]}) == len(places[0])
    assert append not in {n.target for n in program.nodes}


class Doubled(torch.nn.Module):
    """Returns its input and something behind it: a state in form alone."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.relu()], 1)


def test_what_is_joined_is_not_carried() -> None:
    for dynamic in (False, True):
        program = qcompiler.capture(Doubled(), (torch.randn(2, 4),), dynamic=dynamic)
        assert [begins_empty(s, program) for s in states(program)] == [False]
        x = torch.randn(2, 4)
        assert growing(program)(x).is_contiguous()


def test_a_window_is_seen_through_a_whole_cache() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    module = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 12))
    program = qcompiler.capture(module, {"input_ids": ids}, cache=True)
    first = program(ids[:, :7])
    second = program(ids[:, 7:], past_key_values=first.past_key_values)
    with torch.no_grad():
        whole = module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(second.logits, whole[:, 7:], rtol=1e-4, atol=1e-5)


def test_the_module_is_left_as_it_was_and_names_are_its_own() -> None:
    module, example = zoo.build("llama")
    plain = qcompiler.capture(module, example)
    cached = qcompiler.capture(module, example, cache=True)
    assert "forward" not in vars(module)
    for program in (plain, cached):  # constants of its own are no parameters
        names = {n for n in program.params if not n.startswith("lifted")}
        assert names == {n for n, _ in module.named_parameters()} | {
            n for n in names if "inv_freq" in n
        }
    linears = [{i for i in p.by_id if "/linear#" in i} for p in (plain, cached)]
    assert linears[0] == linears[1] and linears[0]
    ids = torch.ones(2, 5, dtype=torch.long)
    for given, found in (
        ({"input_ids": torch.rand(2, 5)}, r"found torch.float32\[2, 5\]"),
        ({"input_ids": ids, "token_type_ids": ids}, r"found torch.int64\[2, 5\], token_type_ids"),
    ):
        with pytest.raises(BadInput, match=f"attention_mask; {found}"):
            qcompiler.capture(module, given, cache=True)
    assert "forward" not in vars(module)


def test_what_may_be_empty_may_be_left_out() -> None:
    module, example = zoo.build("llama")
    io = qcompiler.capture(module, example, cache=True).io
    assert io.optional == {"past_key_values"}
    ids = torch.zeros(3, 2, dtype=torch.long)
    ids_, *past = io.flatten((ids,), {})
    assert ids_ is ids and {tuple(p.shape) for p in past} == {(3, 2, 0, past[0].shape[-1])}
    named = io.flatten((), {"input_ids": ids, "past_key_values": None})
    assert [p.shape for p in named[1:]] == [p.shape for p in past]
    with pytest.raises(BadInput, match="found nothing"):
        io.flatten((), {})
    drawn = random_inputs(io, 1, {"past": 6})
    assert drawn[1].shape[2] == 6


def test_refused_with_a_way_out(tmp_path: Path) -> None:
    module, example = zoo.build("llama")
    with pytest.raises(BadInput, match="leave out `dynamic`"):
        qcompiler.capture(module, example, cache=True, dynamic=False)
    bert, inputs = zoo.build("bert")
    with pytest.raises(BadInput, match="argument of a decoder of transformers"):
        qcompiler.capture(bert, inputs, cache=True)
    cnn, picture = zoo.build("cnn")
    with pytest.raises(BadInput, match="argument of a decoder of transformers"):
        qcompiler.capture(cnn, picture, cache=True)
    plain = qcompiler.compile(module, example, passes="canonicalize", backend="reference")
    with pytest.raises(BadInput, match="cache=True"):
        plain.generate(torch.tensor([[1]]))
    with pytest.raises(BadInput, match="graph already"):
        qcompiler.capture(plain.export(tmp_path / "plain.onnx"), cache=True)


def test_more_tokens_than_positions_are_refused_with_the_table() -> None:
    module, example = zoo.build("gpt2")
    made = qcompiler.compile(module, example, passes="canonicalize", cache=True)
    most = module.config.n_positions
    assert made.generate(torch.tensor([[1, 2, 3]]), count=most - 2).shape == (1, most + 1)
    with pytest.raises(BadInput, match=rf"rows 0 to {most - 1}.*may be as many as there are"):
        made.generate(torch.tensor([[1, 2, 3]]), count=most)
    with pytest.raises(BadInput, match="the call: input input_ids holds 9999"):
        made(torch.tensor([[9999]]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama in 8 bits with its cache, calibrated on batches that have none."""
    data = [{"input_ids": torch.randint(0, 1000, (2, 24))} for _ in range(2)]
    made = qcompiler.compile(MODEL, recipe="w8a8-static", data=data, cache=True)
    return made.save(tmp_path_factory.mktemp("cached") / "out")


def test_greedy_is_what_transformers_writes() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    ids = torch.tensor([[5, 80, 300], [7, 7, 21]])
    made = qcompiler.compile(MODEL, passes="canonicalize", cache=True)
    found = made.generate(ids, count=20)
    want = model.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found, want)


@pytest.fixture(scope="module")
def unequal() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Texts padded at the left, the mask that hides that, and the texts."""
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    ids[mask == 0] = 0
    return ids, mask, [row[row_mask == 1] for row, row_mask in zip(ids, mask, strict=True)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_texts_of_unequal_length(
    name: str, unequal: tuple[Tensor, Tensor, list[Tensor]], tmp_path: Path
) -> None:
    """As transformers writes them, and each as it is written alone."""
    module, _ = zoo.build(name)
    ids, mask, texts = unequal
    example = {"input_ids": ids, "attention_mask": mask}
    data = [example, {"input_ids": ids}]
    made = qcompiler.compile(
        module, example, passes="canonicalize{optional=true},smooth{optional=true}", data=data,
        cache=True,
    )  # fmt: skip
    assert made.program.io.optional == {"past_key_values", "padding"}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = module.generate(ids, attention_mask=mask, **options)
    assert torch.equal(made.generate(ids, attention_mask=mask, count=6), want)
    loaded = qcompiler.load(made.save(tmp_path / "out"))
    found = loaded.generate([text.tolist() for text in texts], count=6)
    assert torch.equal(found, want)
    for text, row in zip(texts, want, strict=True):
        assert torch.equal(made.generate(text[None], count=6)[0], row[-len(text) - 6 :])
    for wrong, words in (
        ({"attention_mask": mask[:, 2:]}, r"past \+ sequence\), 9 tokens here; found 7"),
        ({"attention_mask": mask[:1]}, r"padding: int64\[batch\] does not take shape \[1\]"),
        ({"attention_mask": mask, "padding": mask.sum(1)}, "attention_mask or padding, not both"),
        ({"attention_mask": 3}, "tensor .batch, tokens. of ones and zeros; found int"),
    ):
        with pytest.raises(BadInput, match=words):
            made(ids, **wrong)
    with pytest.raises(BadInput, match="the shape of input_ids"):
        made.generate(ids, attention_mask=mask[:, 3:])
    assert torch.equal(made(ids, attention_mask=None).logits, made(ids).logits)
    first = made(ids[:, :6], attention_mask=mask[:, :6])
    then = made(ids[:, 6:], past_key_values=first.past_key_values, attention_mask=mask)
    whole = made(ids, attention_mask=mask).logits
    torch.testing.assert_close(then.logits, whole[:, 6:], rtol=1e-4, atol=1e-5)
    alone = made(texts[0][None]).logits
    torch.testing.assert_close(whole[:1, 4:], alone, rtol=1e-4, atol=1e-5)


def test_statistics_are_of_no_padding(unequal: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    module, _ = zoo.build("llama")
    ids, mask, _ = unequal
    example = {"input_ids": ids, "attention_mask": mask}
    program = qcompiler.capture(module, example, cache=True)
    counts = Padding(program).counts(program.io.flatten((), example))
    assert torch.equal(counts, mask == 1)
    assert Padding(program).counts(program.io.flatten((), {"input_ids": ids})) is None
    past = program(ids[:, :3], attention_mask=mask[:, :3]).past_key_values
    more = {"input_ids": ids[:, 3:], "attention_mask": mask, "past_key_values": past}
    counts = Padding(program).counts(program.io.flatten((), more))
    assert torch.equal(counts, mask[:, 3:] == 1)


def test_unequal_texts_that_cannot_be_written_say_why(
    unequal: tuple[Tensor, Tensor, list[Tensor]],
) -> None:
    module, example = zoo.build("llama")
    ids, mask, texts = unequal
    plain = qcompiler.compile(module, example, passes="canonicalize", cache=True)
    assert torch.equal(
        plain.generate([texts[0], texts[0]], count=2)[0], plain.generate([texts[0]], count=2)[0]
    )
    for given, words in (
        ((texts,), "example inputs that have an attention_mask"),
        (([],), "or a list of texts of ids; found \\[\\]"),
        ((["ab"],), r"a list of texts of ids; found \['ab'\]"),
        (([[]],), "at least one.*of shape \\[1, 0\\]"),
    ):
        with pytest.raises(BadInput, match=words):
            plain.generate(*given)
    with pytest.raises(BadInput, match="zeros at the left of its rows alone"):
        plain.generate(ids, attention_mask=mask.flip(1))
    with pytest.raises(BadInput, match="a row without a token"):
        plain.generate(ids, attention_mask=mask * 0)
    with pytest.raises(BadInput, match="has the shape of input_ids"):
        qcompiler.capture(module, {"input_ids": ids, "attention_mask": mask[:, 1:]}, cache=True)


def test_saved_and_loaded_it_writes_the_same(folder: Path) -> None:
    ids = torch.tensor([[5, 80, 300]])
    made = qcompiler.load(folder)
    found = made.generate(ids, count=12)
    assert torch.equal(found, qcompiler.load(folder, backend="reference").generate(ids, count=12))
    assert torch.equal(torch.stack(list(made.stream(ids, count=12)), 1), found[:, 3:])


class Words:
    """A model of 5 words that always says the same."""

    logits = torch.tensor([0.1, 0.4, 0.3, 0.15, 0.05]).log()

    def __call__(self, input_ids: Tensor, past_key_values: object) -> object:
        shape = (*input_ids.shape, 5)
        return SimpleNamespace(logits=self.logits.expand(shape), past_key_values=None)


def written(count: int = 400, **options: Any) -> Iterator[int]:
    io: Any = SimpleNamespace(optional={"past_key_values"}, tensors=())
    ids = torch.tensor([[0]])
    return map(int, generate(Words(), io, ids, count=count, **options))


def test_words_are_drawn_as_often_as_they_are_likely() -> None:
    assert set(written(20)) == set(written(20, temperature=1e-40)) == {1}
    counts = torch.bincount(torch.tensor(list(written(4000, temperature=1.0))), minlength=5)
    torch.testing.assert_close(counts / 4000, Words.logits.exp(), rtol=0, atol=0.03)
    cold = torch.bincount(torch.tensor(list(written(4000, temperature=0.5))), minlength=5)
    squared = Words.logits.exp() ** 2
    torch.testing.assert_close(cold / 4000, squared / squared.sum(), rtol=0, atol=0.03)
    assert set(written(temperature=1.0, top_k=2)) == {1, 2}
    assert set(written(temperature=1.0, top_p=0.5)) == {1, 2}  # 0.4 is not enough, 0.7 is
    assert set(written(temperature=1.0, top_p=0.4)) == {1}
    assert list(written(temperature=1.0, seed=3)) == list(written(temperature=1.0, seed=3))
    assert list(written(temperature=1.0, seed=3)) != list(written(temperature=1.0, seed=4))


def test_it_stops_when_each_row_has_ended() -> None:
    assert list(written(10, stop={1})) == [1]
    drawn = list(written(temperature=1.0, stop={2}))
    assert drawn[-1] == 2 and 2 not in drawn[:-1]
    for wrong, words in (
        ({"count": 0}, "count is 1 or more; found 0"),
        ({"temperature": -1.0}, "temperature is 0 or more"),
        ({"top_p": 0.0, "top_k": -1}, "top_k is 0 .* top_p is in"),
        ({"stop": 5}, "stop is a list of token ids; found 5"),
        ({"stop": ["end"]}, "stop is a list of token ids"),
    ):
        with pytest.raises(BadInput, match=words):
            list(written(**wrong))
    with pytest.raises(BadInput, match=r"at least one.*found torch"):
        list(
            generate(
                Words(), SimpleNamespace(optional={"past_key_values"}), torch.zeros(1, 0).long()
            )
        )


def test_a_row_that_has_ended_goes_on_with_its_token() -> None:
    class Turns(Words):
        def __call__(self, input_ids: Tensor, past_key_values: object) -> object:
            said = (input_ids[:, -1] + 1) % 5
            logits = torch.nn.functional.one_hot(said, 5).float()[:, None]
            return SimpleNamespace(logits=logits, past_key_values=None)

    io = SimpleNamespace(optional={"past_key_values"}, tensors=())
    rows = torch.stack(list(generate(Turns(), io, torch.tensor([[0], [2]]), stop=[3])), 1)
    assert rows.tolist() == [[1, 2, 3], [3, 3, 3]]


def run(*words: object) -> object:
    result = CliRunner().invoke(main, [str(w) for w in words])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def test_commands_know_the_cache(folder: Path, tmp_path: Path) -> None:
    said = json.loads(run("generate", folder, "def f(", "--count", 5, "--json").stdout)
    assert len(said["tokens"]) == 5 and said["prompt_tokens"] > 0 and said["text"]
    shown = run("generate", folder, "def f(", "--count", 5)
    assert shown.stdout.rstrip("\n") == "def f(" + said["text"].rstrip("\n")
    assert "written a second" in shown.stderr
    sizes = json.loads(run("bench", folder, "--sequence", 1, "--past", 32, "--json").stdout)[
        "sizes"
    ]
    assert sizes == {"batch": 1, "sequence": 1, "past": 32}
    heldout = MODEL.parent / "heldout.txt"
    found = json.loads(run("eval", folder, "--data", heldout, "--batches", 1, "--json").stdout)
    assert found["float_perplexity"] < found["perplexity"] < 2.5 * found["float_perplexity"]
    failed = CliRunner().invoke(main, ["generate", str(tmp_path), "x"])
    assert failed.exit_code == 2 and "qcompiler artifact" in failed.output


def test_the_command_line_compiles_with_a_cache(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = run(
        "compile", MODEL, "-o", out, "--passes", "canonicalize", "--cache-format", "int8", "--json"
    )
    steps = json.loads(made.stdout)["steps"]
    assert [s["name"] for s in steps] == ["canonicalize", "round_cache"]
    assert qcompiler.load(out).program.io.optional == {"past_key_values"}
    (out / "qcompiler.json").write_text(
        (out / "qcompiler.json").read_text().replace(str(MODEL), str(tmp_path / "gone"))
    )
    for tokenizer in out.glob("content-*/tokenizer/tokenizer.json"):
        tokenizer.unlink()
    failed = CliRunner().invoke(main, ["generate", str(out), "x"])
    assert failed.exit_code == 2 and "tokenizer.json" in failed.output


def test_the_graph_in_float64_is_exact() -> None:
    """The rewritten step is the step that was captured."""
    module, example = zoo.build("llama")
    program = qcompiler.capture(module, example, cache=True)
    made = qcompiler.compile(
        module, example, passes="canonicalize", backend="reference", cache=True
    )
    for sizes in ({"past": 0}, {"past": 5, "sequence": 1}):
        inputs = random_inputs(program.io, 2, sizes)
        for a, b in zip(
            evaluate_wide(program, inputs), evaluate_wide(made.program, inputs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
