"""For those who installed it: every claim holds, and what is not claimed is refused by sentence."""

import pytest
import torch

import qcompiler
from qcompiler.testing import assert_conforms


def test_it_conforms() -> None:
    assert_conforms("my_backend")


@pytest.mark.parametrize("sizes", [(8, 8), (13, 21), (1, 40)])
def test_padding_is_no_part_of_the_result(sizes: tuple[int, int]) -> None:
    out, width = sizes
    model, x = torch.nn.Sequential(torch.nn.Linear(width, out)).eval(), torch.randn(3, width)
    passes = "canonicalize{optional=true},assign{activation=int8:token:dynamic head=same},quantize"
    compiled = qcompiler.compile(model, x, passes=passes, backend="my_backend")
    assert compiled.kernels == {"0/linear#0": "tiles"}
    torch.testing.assert_close(compiled(x), compiled.program(x))
