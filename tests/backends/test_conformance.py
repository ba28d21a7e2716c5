"""Claims of backends are held against the reference, and every kind of lie is found by name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner

import qcompiler
from qcompiler.backend import Artifact, Backend, Capability, ProgramArtifact
from qcompiler.check import relative_error
from qcompiler.cli import main
from qcompiler.registry import backend_class, get_backend
from qcompiler.samples import Flat
from qcompiler.schemes import fit
from qcompiler.testing import assert_conforms, conformance
from qcompiler.testing.catalogue import ACTIVATIONS, WEIGHTS
from qcompiler.testing.subjects import KINDS, SHAPES, Shape, subject
from qcompiler.testing.trial import Built, quantized

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples/my_backend"))
import my_backend

FORMATS = ("int8:channel", "int8:token:dynamic")
HONEST = Capability("plain", "linear", *FORMATS, 1e-5, splits_sums=True)


class Plain(Backend):
    """The reference under another name, with a claim: conforms."""

    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "the reference"
    capabilities: ClassVar[tuple[Capability, ...]] = (HONEST,)


class Planted(ProgramArtifact):
    """The reference, with a bug that a subclass puts in."""

    def run(self, inputs: Flat) -> tuple[object, ...]:
        return tuple(self.spoil(y) for y in super().run(inputs))

    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Saturating(Planted):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y.clamp(-8, 8)


class ByThreads(Planted):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y * (1 + 1e-6 * torch.get_num_threads())


class NotANumber(Planted):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y == 0, torch.nan, y)


class Counting(Planted):
    calls = 0

    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return y * (1 + 1e-6 * (self.calls > 49))


class Reusing(ProgramArtifact):
    """Hands out the memory of the call before."""

    held: tuple[torch.Tensor, ...] = ()

    def run(self, inputs: Flat) -> tuple[object, ...]:
        found = super().run(inputs)
        if [y.shape for y in self.held] != [y.shape for y in found]:
            self.held = found
        return tuple(old.copy_(y) for old, y in zip(self.held, found, strict=True))


class NotEmpty(Planted):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        if not y.numel():
            raise ZeroDivisionError("no rows")
        return y


class NoStrides(ProgramArtifact):
    """Takes its input to lie in memory without gaps."""

    def run(self, inputs: Flat) -> tuple[object, ...]:
        (x,) = inputs
        return super().run((x.as_strided(x.shape, torch.empty(x.shape).stride()),))


class NoWholeTile(Planted):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y * (1 + 1e-2 * (y.shape[0] == 64))


class Narrow(Planted):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y.double()


def planted(artifact: type[Artifact], splits_sums: bool = False) -> Backend:
    class Bad(Plain):
        capabilities: ClassVar[tuple[Capability, ...]] = (replace(HONEST, splits_sums=splits_sums),)

        def build(self, program: qcompiler.Program) -> Artifact:
            return artifact(program)

    return Bad()


def test_the_reference_conforms() -> None:
    report = conformance(Plain(), speed=True)
    (claim,) = report.claims
    assert report.ok and str(report).startswith("plain: conforms")
    assert len(claim.served) >= 6 * len(KINDS) and not claim.refusals
    assert set(claim.speed) == {1, 64}
    assert report.as_dict()["claims"][0]["passed"] == len(claim.served)


@pytest.mark.parametrize(
    ("artifact", "words"),
    [
        (Saturating, "is off by"),
        (NotANumber, "is off by inf"),
        (ByThreads, "gives another result on two threads"),
        (Counting, "gives another result on a second call"),
        (Reusing, "gives another result once later calls have been made"),
        (NotEmpty, "fails on batch of 0: ZeroDivisionError('no rows')"),
        (Narrow, "returns torch.float64"),
        (NoStrides, "is off by inf (allowed 1e-05) on numbers with gaps between them in memory"),
        (NoWholeTile, "on batch of 64"),
    ],
)
def test_planted_bugs_are_found(artifact: type[Artifact], words: str) -> None:
    backend = planted(artifact, splits_sums=artifact is not ByThreads)
    report = conformance(backend, quick=True)
    assert not report.ok and not report.as_dict()["ok"]
    assert any(words in case.failure for case in report.claims[0].failures)
    assert "FAIL plain: linear int8:channel × int8:token:dynamic" in str(report)
    with pytest.raises(AssertionError, match="1 of 1 claims fail"):
        assert_conforms(backend, quick=True)


class Flipping(ProgramArtifact):
    """Rounds what lies between two codes the other way: by x · (1 / s), and half up."""

    def run(self, inputs: Flat) -> tuple[object, ...]:
        class Other(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> object:
                if target is not torch.ops.qc.fake_quantize.default:
                    return super().call_function(target, args, kwargs)
                x = args[0].float()
                scale, _ = torch.ops.qc.dynamic_scale(x, args[1])
                codes = torch.floor(x * (1 / scale) + 0.5).clamp(-128, 127)
                return (codes * scale).to(args[0].dtype)

        params = [self.program.params[name] for name in self.program.slots.values()]
        with torch.no_grad():
            return tuple(Other(self.program.function).run(*params, *inputs))


class FlippingAndWrong(Flipping):
    def run(self, inputs: Flat) -> tuple[object, ...]:
        return tuple(y * (1 + 1e-3) for y in super().run(inputs))


@pytest.mark.parametrize(
    ("artifact", "flips", "ok"),
    [(Flipping, True, True), (Flipping, False, False), (FlippingAndWrong, True, False)],
)
def test_codes_may_flip_if_the_claim_says_so(
    artifact: type[Artifact], flips: bool, ok: bool
) -> None:
    class Bad(Plain):
        capabilities: ClassVar[tuple[Capability, ...]] = (
            replace(HONEST, activation="int8:token:dynamic:full", flips=flips),
        )

        def build(self, program: qcompiler.Program) -> Artifact:
            return artifact(program)

    report = conformance(Bad(), quick=True)
    assert report.ok is ok, str(report)


class OffByOneRow(Planted):
    """One output of many, a thousandth off."""

    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[..., 0] *= 1.001
        return y


def test_one_wrong_output_is_seen() -> None:
    report = conformance(planted(OffByOneRow, splits_sums=True), quick=True)
    assert not report.ok


def test_last_bits_may_depend_on_threads_if_the_claim_says_so() -> None:
    report = conformance(planted(ByThreads, splits_sums=True), quick=True)
    assert report.ok
    assert "last bits depend on threads" in report.claims[0].claim.conditions


class WrongTiles(my_backend.LowerTiles):
    """Tiles that lie the other way round."""

    name: ClassVar[str] = "wrong_tiles"

    def pack(self, weight: qcompiler.QTensor) -> dict[str, torch.Tensor]:
        packed = super().pack(weight)
        return {**packed, "tiles": packed["tiles"].transpose(2, 3).contiguous()}


class WrongBackend(my_backend.MyBackend):
    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[qcompiler.Pass, ...]:
        return (WrongTiles(exclude=tuple(sorted(exclude))),)


def test_a_wrong_packing_is_named() -> None:
    assert conformance(my_backend.MyBackend(), quick=True).ok
    (claim,) = conformance(WrongBackend(), quick=True).claims
    wrong = [case.failure for case in claim.failures]
    assert len(wrong) >= 15 and all("its kernel is off the reference here" in w for w in wrong)


@torch.library.custom_op("tests::flat_linear", mutates_args=())
def flat_linear(
    x: torch.Tensor, tiles: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return my_backend.linear(x, tiles, scale, bias)


@flat_linear.register_fake
def _(
    x: torch.Tensor, tiles: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty((x.shape[0], len(scale)))  # right for two axes


class FlatTiles(my_backend.LowerTiles):
    name: ClassVar[str] = "flat_tiles"
    operator: ClassVar[Any] = torch.ops.tests.flat_linear.default


class FlatBackend(my_backend.MyBackend):
    def lowering(self, exclude: frozenset[str] = frozenset()) -> tuple[qcompiler.Pass, ...]:
        return (FlatTiles(exclude=tuple(sorted(exclude))),)


def test_a_fake_operator_that_is_wrong_is_named() -> None:
    (claim,) = conformance(FlatBackend()).claims
    wrong = {case.failure for case in claim.failures}
    assert all(w.startswith("BackendError: tests.flat_linear returns") for w in wrong)
    assert any("[5, 2, 48] where its fake operator says" in w for w in wrong)
    assert claim.served  # those of two axes


@pytest.mark.parametrize(
    ("claim", "words"),
    [
        (replace(my_backend.INT8, weight="int8:chanel"), "did you mean 'channel'"),
        (replace(my_backend.INT8, weight="int9:*"), "no format matches its patterns"),
        (replace(my_backend.INT8, op="liner"), "did you mean 'linear'"),
        (
            replace(my_backend.INT8, op="conv", weight="*", activation="*"),
            "nothing serves it, and nothing says why",
        ),
        (replace(my_backend.INT8, kernel="other"), "tiles serves it instead"),
    ],
)
def test_what_is_never_served_is_a_failure_by_name(claim: Capability, words: str) -> None:
    class Boasting(my_backend.MyBackend):
        capabilities: ClassVar[tuple[Capability, ...]] = (my_backend.INT8, claim)

    good, bad = conformance(Boasting(), quick=True).claims
    assert good.ok
    (failure,) = bad.failures
    assert failure.failure.startswith("claims what it never serves") and words in str(bad)


def test_shapes_and_features_are_refused_by_sentence() -> None:
    class Old(Plain):
        capabilities: ClassVar[tuple[Capability, ...]] = (
            replace(HONEST, multiple_of=(16, 32)),
            replace(HONEST, kernel="fast", needs=("dragons",)),
        )

        def has(self, feature: str) -> bool:
            return feature != "dragons"

    report = conformance(Old())
    shapes, features = report.claims
    assert shapes.ok and len(shapes.served) > 20
    assert any("takes multiples of 16 × 32" in why for why in shapes.refusals)
    assert "found 37 × 41" in "".join(shapes.refusals)
    assert features.ok and not features.cases
    assert "not tried, needs dragons, which this machine lacks" in str(features)
    site = subject(SHAPES[0]).sites[0]
    assert "needs dragons" in str(Old().only("fast").refuses(site, fit(site, *FORMATS)))


def test_claims_are_chosen_by_pattern() -> None:
    assert not conformance("reference").claims
    with pytest.raises(qcompiler.BadInput, match="it claims plain"):
        conformance(Plain(), claims="int8*")


def test_the_catalogue_parses() -> None:
    for text in (*WEIGHTS, *ACTIVATIONS):
        assert text == "float" or qcompiler.QFormat.parse(text)


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompiler.testing.get_backend", lambda name: WrongBackend())
    result = CliRunner().invoke(main, ["check-backend", "wrong", "--quick", "--json"])
    assert result.exit_code == 1
    (claim,) = json.loads(result.stdout)["claims"]
    assert claim["kernel"] == "tiles" and claim["failures"]
    result = CliRunner().invoke(main, ["check-backend", "wrong", "--claim", "no*"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        (SHAPES[0], "float"),
        (SHAPES[0], "int8:group24"),
        (SHAPES[5], "float"),
        (SHAPES[5], "int4:channel"),
    ],
)
def test_onnxruntime_leaves_floating_weights_alone(shape: Shape, weight: str) -> None:
    """Between two static formats it would round them to int8, with one scale for all."""
    pytest.importorskip("onnxruntime")
    made = subject(shape, behind=True)
    program = quantized(made, fit(made.sites[0], weight, "int8:tensor"))
    built = Built.of(program, get_backend("onnxruntime"), "*")
    words, x = made.inputs[3]
    assert words == "batch of 33"
    assert relative_error(program.flat(x), built.artifact.run(x)) < 1e-3


def test_onnxruntime_holds_a_bias_of_many_steps() -> None:
    """In steps of s_x s_w, the bias of a channel that is next to nothing is beyond int32."""
    pytest.importorskip("onnxruntime")
    made = subject(SHAPES[5], behind=True)
    assert made.kinds[5].startswith("denormals")
    program = quantized(made, fit(made.sites[0], "int8:channel", "int8:tensor"))
    built = Built.of(program, get_backend("onnxruntime"), "QLinearConv")
    x = made.inputs[0][1]
    assert relative_error(program.flat(x)[5], built.artifact.run(x)[5]) < 1e-2
    assert built.artifact.kernels[made.sites[5].id] == "float Conv"
    assert built.artifact.kernels[made.sites[0].id] == "QLinearConv"


BUILT_IN_CLAIMS = [
    ("cpu", "*"),
    ("onnxruntime", "MatMulIntegerToFloat"),
    ("onnxruntime", "MatMulNBits*"),
    ("onnxruntime", "Gather"),
    ("openvino", "*"),
]


@pytest.mark.parametrize(("backend", "claims"), BUILT_IN_CLAIMS)
def test_built_in_backends_conform_quickly(backend: str, claims: str) -> None:
    if reason := backend_class(backend)().available():
        pytest.skip(reason)
    assert_conforms(backend, claims=claims, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx2", "neon", "plain"])
def test_other_instruction_sets_conform(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels generated for less than this CPU can do, the portable ones among them."""
    isa = pytest.importorskip("qcompiler.backends.cpu.codegen.isa")
    from qcompiler.backends.cpu.kernels import self_test

    if name not in isa._available():
        pytest.skip(f"this CPU does not run {name}")
    monkeypatch.setenv(isa.VARIABLE, name)
    self_test.cache_clear()
    try:
        for claims in ("integer", "decoding", "conv"):
            assert_conforms("cpu", claims=claims, quick=True)
    finally:
        self_test.cache_clear()
