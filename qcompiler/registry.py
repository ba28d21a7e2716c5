"""Finding what can be plugged in by name: entry points, plus a table for a checkout.

A plug-in is a package with an entry point in `qcompiler.passes`, `qcompiler.roundings`,
`qcompiler.metrics` or `qcompiler.backends`. One that fails to import is reported by name, and the
others go on.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TypeVar

from qcompiler.backend import Backend
from qcompiler.errors import BackendError, BadInput, first_line, unknown
from qcompiler.passbase import Pass
from qcompiler.rounding.base import Rounding
from qcompiler.sensitivity.base import Metric
from qcompiler.spec import PassSpec, parse_pipeline

BUILT_IN = {
    "qcompiler.passes": {
        "adopt": "qcompiler.passes.adopt:Adopt",
        "allocate": "qcompiler.passes.allocate:Allocate",
        "assign": "qcompiler.passes.assign:Assign",
        "canonicalize": "qcompiler.passes.canonicalize:Canonicalize",
        "fold": "qcompiler.passes.fold:Fold",
        "quantize": "qcompiler.passes.quantize:Quantize",
        "unquantize": "qcompiler.passes.unquantize:Unquantize",
        "use_plan": "qcompiler.passes.use_plan:UsePlan",
        "round_cache": "qcompiler.passes.round_cache:RoundCache",
        "untie": "qcompiler.passes.untie:Untie",
        "absorb_norms": "qcompiler.passes.absorb_norms:AbsorbNorms",
        "center": "qcompiler.passes.center:Center",
        "learn_rotation": "qcompiler.passes.learn_rotation:LearnRotation",
        "rotate": "qcompiler.passes.rotate:Rotate",
        "affine": "qcompiler.passes.affine:Affine",
        "equalize": "qcompiler.passes.equalize:Equalize",
        "permute": "qcompiler.passes.permute:Permute",
        "reparameterize": "qcompiler.passes.reparameterize:Reparameterize",
        "shift": "qcompiler.passes.shift:Shift",
        "scale_inputs": "qcompiler.passes.scale_inputs:ScaleInputs",
        "smooth": "qcompiler.passes.smooth:Smooth",
        "split_channels": "qcompiler.passes.split_channels:SplitChannels",
        "split_groups": "qcompiler.passes.split_groups:SplitGroups",
        "split_low_rank": "qcompiler.passes.split_low_rank:SplitLowRank",
        "split_outliers": "qcompiler.passes.split_outliers:SplitOutliers",
        "split_sparse": "qcompiler.passes.split_sparse:SplitSparse",
    },
    "qcompiler.roundings": {
        "adaround": "qcompiler.rounding.adaround:AdaRound",
        "clip": "qcompiler.rounding.clip:Clip",
        "decoupleq": "qcompiler.rounding.decoupleq:DecoupleQ",
        "flexround": "qcompiler.rounding.flexround:FlexRound",
        "gptq": "qcompiler.rounding.gptq:Gptq",
        "hqq": "qcompiler.rounding.hqq:Hqq",
        "kmeans": "qcompiler.rounding.kmeans:KMeans",
        "nearest": "qcompiler.rounding.nearest:Nearest",
        "quantease": "qcompiler.rounding.descent:QuantEase",
        "search": "qcompiler.rounding.search:Search",
        "signround": "qcompiler.rounding.signround:SignRound",
        "spqr": "qcompiler.rounding.spqr:SpQR",
    },
    "qcompiler.metrics": {
        "divergence": "qcompiler.sensitivity.outputs:Divergence",
        "eigenvalue": "qcompiler.sensitivity.curvature:Eigenvalue",
        "error": "qcompiler.sensitivity.outputs:Error",
        "fisher": "qcompiler.sensitivity.gradients:Fisher",
        "gauss_newton": "qcompiler.sensitivity.gauss_newton:GaussNewton",
        "hessian": "qcompiler.sensitivity.curvature:Hessian",
        "layer": "qcompiler.sensitivity.layers:LayerImportance",
        "salience": "qcompiler.sensitivity.layers:Salience",
        "taylor": "qcompiler.sensitivity.gradients:Taylor",
    },
    "qcompiler.backends": {
        "checkpoint": "qcompiler.backends.checkpoint:CheckpointBackend",
        "cpu": "qcompiler.backends.cpu:CpuBackend",
        "gguf": "qcompiler.backends.checkpoint.gguf:GgufBackend",
        "null": "qcompiler.backends.null:NullBackend",
        "onnxruntime": "qcompiler.backends.onnxruntime:OnnxRuntimeBackend",
        "openvino": "qcompiler.backends.openvino:OpenVinoBackend",
        "reference": "qcompiler.backends.reference:ReferenceBackend",
        "triton": "qcompiler.backends.triton:TritonBackend",
    },
}


AND = " and "


@lru_cache(maxsize=4)
def table(group: str) -> dict[str, str]:
    """Name → `module:attribute`, ours and everybody's; several of one name are joined by AND."""
    found = dict(BUILT_IN[group])
    for point in entry_points(group=group):
        known = found.get(point.name, point.value)
        if point.value not in known.split(AND):
            known += AND + point.value
        found[point.name] = known
    return found


def get_pass(name: str) -> type[Pass]:
    """The class of the pass called `name`."""
    return _class("passes", name, Pass)


def rounding_class(name: str) -> type[Rounding]:
    """The class of the rounding called `name`."""
    return _class("roundings", name, Rounding)


def get_rounding(text: str) -> Rounding:
    """The rounding that `text` names, with its options: `gptq`, `gptq{damping=0.05}`."""
    spec = _one(text, "rounding")
    return rounding_class(spec.name).make(spec.options)


def metric_class(name: str) -> type[Metric]:
    """The class of the metric called `name`."""
    return _class("metrics", name, Metric)


def get_metric(text: str) -> Metric:
    """The metric that `text` names, with its options: `fisher`, `gauss_newton{by="token"}`."""
    spec = _one(text, "metric")
    return metric_class(spec.name).make(spec.options)


def backend_class(name: str) -> type[Backend]:
    """The class of the backend called `name`, which may be of no use on this machine."""
    return _class("backends", name, Backend)


def get_backend(name: str) -> Backend:
    """A new backend called `name`, ready to use here."""
    cls = backend_class(name)
    try:
        backend = cls()
        reason = backend.available()
    except Exception as error:
        words = f"{type(error).__name__}: {first_line(error)}"
        raise BackendError(f"backend {name!r} fails to start: {words}") from error
    if reason:
        raise BackendError(f"backend {name!r} cannot be used here: {reason}")
    return backend


def make_passes(passes: str | tuple[Pass | str | PassSpec, ...] | list[Pass]) -> tuple[Pass, ...]:
    """Passes from text, or from a sequence of passes, names and specs."""
    items = parse_pipeline(passes) if isinstance(passes, str) else passes
    made: list[Pass] = []
    for item in items:
        if isinstance(item, Pass):
            made.append(item)
        elif isinstance(item, PassSpec):
            made.append(get_pass(item.name).make(item.options))
        else:
            made += make_passes(item)
    return tuple(made)


def _one(text: str, what: str) -> PassSpec:
    specs = parse_pipeline(text)
    if len(specs) != 1:
        raise BadInput(f"one {what} is wanted; found {text!r}")
    return specs[0]


Base = TypeVar("Base", Pass, Rounding, Metric, Backend)


def _class(group: str, name: str, base: type[Base]) -> type[Base]:
    """What is plugged in as `name`, which must be a `base`."""
    known, what = table(f"qcompiler.{group}"), base.__name__.lower()
    if name not in known:
        raise unknown(what, name, known)
    if AND in known[name]:
        raise BadInput(f"two providers of {what} {name!r}: {known[name]}; uninstall one of them")
    module, _, attribute = known[name].partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # another's module may raise anything as it is imported
        words = f"{type(error).__name__}: {first_line(error)}"
        raise BadInput(f"{what} {name!r} ({known[name]}) fails to import: {words}") from error
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise BadInput(
            f"{what} {name!r} is {cls!r}; expected a subclass of qcompiler.{base.__name__}"
        )
    own = getattr(cls, "name", name)
    if own != name:
        raise BadInput(
            f"{what} {name!r} ({known[name]}) calls itself {own!r}; its entry point must have the "
            "same name"
        )
    return cls
