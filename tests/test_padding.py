"""What padding holds changes nothing that calibration finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from zoo import build

import qcompiler
from qcompiler import Program, QFormat, Scheme
from qcompiler.facts import measure
from qcompiler.fisher import fisher
from qcompiler.objective import mse
from qcompiler.padding import Padding, mask_of
from qcompiler.registry import get_metric, get_rounding
from qcompiler.samples import Flat
from qcompiler.sensitivity import Study
from qcompiler.sensitivity import measure as sensitivity
from qcompiler.sites import sites
from qcompiler.walk import Walk


@pytest.fixture(scope="module")
def bert() -> Program:
    module, example = build("bert")
    program = qcompiler.capture(module, example)
    scheme = Scheme(QFormat.parse("int4:channel"))
    return replace(
        program, plan={s.id: scheme for s in sites(program.graph.nodes) if s.x is not None}
    )


def batches(bert: Program, seed: int, padded: bool = True) -> list[Flat]:
    """Two batches whose words are the same for every seed, and whose padding is not."""
    words, filling = (torch.Generator().manual_seed(s) for s in (0, seed))
    found = []
    for lengths in ((11, 7, 4), (3, 11, 9)):
        ids = torch.randint(0, 100, (3, 11), generator=words)
        mask = (torch.arange(11) < torch.tensor(lengths)[:, None]).long()
        other = torch.randint(0, 100, (3, 11), generator=filling)
        inputs = {
            "input_ids": torch.where(mask.bool(), ids, other),
            "attention_mask": mask if padded else mask | 1,
        }
        found.append(bert.io.flatten((), inputs))
    return found


def same(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_mask_is_found_in_the_graph(bert: Program) -> None:
    assert str(mask_of(bert)) == "attention_mask"
    for name in ("llama", "vit", "cnn"):
        module, example = build(name)
        assert mask_of(qcompiler.capture(module, example)) is None


def test_token_types_are_no_mask() -> None:
    module, example = build("bert")
    example = dict(example, token_type_ids=torch.zeros(3, 11, dtype=torch.int64))
    program = qcompiler.capture(module, example)
    assert str(mask_of(program)) == "attention_mask"


def test_a_mask_that_positions_are_counted_from() -> None:
    from transformers import OPTConfig, OPTModel

    sizes = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16, "vocab_size": 50}
    config = OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    example = {"input_ids": torch.randint(0, 50, (3, 11)), "attention_mask": mask}
    program = qcompiler.capture(OPTModel(config).eval(), {**example, "use_cache": False})
    assert str(mask_of(program)) == "attention_mask"


def test_a_mask_of_ones_hides_nothing(bert: Program) -> None:
    padding = Padding(bert)
    assert padding.counts(batches(bert, 1, padded=False)[0]) is None
    counts = padding.counts(batches(bert, 1)[0])
    assert counts is not None and counts.sum() == 22
    value = torch.randn(3, 11, 5)
    (found,) = padding.data(batches(bert, 1)[0], (value,))
    assert torch.equal(found, value[counts])
    other = torch.randn(3, 4, 11, 11)  # heads and tokens: nothing to leave out
    assert padding.data(batches(bert, 1)[0], (other,))[0] is other


def test_statistics(bert: Program) -> None:
    needs = ("activations", "samples", "histograms")
    one, two = (measure(bert, batches(bert, seed), needs) for seed in (1, 2))
    word = next(s for s in sites(bert.graph.nodes) if s.id.endswith("query/linear#0"))
    assert one.activations[word.id].count == 22 + 23
    for id, seen in one.activations.items():
        same(seen.mean, two.activations[id].mean)
        same(seen.absmax, two.activations[id].absmax)
    assert measure(bert, batches(bert, 1, padded=False)).activations[word.id].count == 66


@pytest.mark.parametrize("name", ["gptq", "signround{steps=10}", "search{by=output}"])
def test_roundings(bert: Program, name: str) -> None:
    found = [Walk(bert, batches(bert, seed), get_rounding(name)).run() for seed in (1, 2)]
    other = Walk(bert, batches(bert, 1, padded=False), get_rounding(name)).run()
    differ = 0
    for id, solved in found[0].items():
        codes: Tensor = solved.weight.data
        # sums in another order may tip a code that lies between two
        assert (codes != found[1][id].weight.data).float().mean() < 0.01
        differ += int((codes != other[id].weight.data).sum())
    assert differ > 100


@pytest.mark.parametrize("name", ["error", "divergence", "hessian", "gauss_newton", "fisher"])
def test_sensitivity(bert: Program, name: str) -> None:
    columns = {s.id: (s_,) for s in sites(bert.graph.nodes) if s.x for s_ in [bert.plan[s.id]]}
    study = Study(bert, columns, loss="mse")
    one, two = (sensitivity(study, get_metric(name), batches(bert, seed)).losses for seed in (1, 2))
    assert one.keys() == two.keys()
    for column in one:
        same(torch.tensor(one[column]), torch.tensor(two[column]))


def test_fisher(bert: Program) -> None:
    one, two = (fisher(bert, batches(bert, seed)) for seed in (1, 2))
    for id, value in one.items():
        torch.testing.assert_close(value, two[id], rtol=1e-3, atol=1e-4)


def test_losses(bert: Program) -> None:
    padding, (batch, _) = Padding(bert), batches(bert, 1)
    wanted = bert.flat(batch)
    moved = (wanted[0] + (batch[1] == 0)[..., None], *wanted[1:])
    assert mse(wanted, moved) > 0.1
    assert mse(padding.data(batch, wanted), padding.data(batch, moved)) == 0
