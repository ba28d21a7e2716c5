"""Passes say what they make and spoil; a wrong order is refused with the right one."""

from __future__ import annotations

import pytest

from qcompiler import BadInput
from qcompiler.order import check_order, right_order
from qcompiler.recipe import load_recipe, recipe_names
from qcompiler.registry import make_passes
from qcompiler.spec import parse_pipeline


@pytest.mark.parametrize(
    ("pipeline", "words", "right"),
    [
        ("smooth,rotate,fold", "'rotate' must come before 'smooth'", "rotate,smooth,fold"),
        ("quantize,assign", "makes the plan, which 'quantize' reads", "assign,quantize"),
        ("assign,quantize,fold", "which 'quantize' ends", "assign,fold,quantize"),
        ("rotate,center", "'center' must come before 'rotate'", "center,rotate"),
        (
            "canonicalize,assign,rotate,quantize,smooth,fold",
            "reads weights in floating point",
            "canonicalize,assign,rotate,smooth,fold,quantize",
        ),
    ],
)
def test_a_wrong_order_is_refused_with_the_right_one(pipeline: str, words: str, right: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        check_order(make_passes(pipeline))
    assert str(caught.value).endswith(f"The right order is {right}")
    check_order(make_passes(right))


def test_a_right_order_is_left_as_it_is() -> None:
    for name in recipe_names():
        passes = load_recipe(name).passes()
        check_order(passes)
        assert right_order(passes) == list(passes)
    check_order(make_passes("smooth,fold,smooth,fold"))


def test_options_survive_in_the_message() -> None:
    with pytest.raises(BadInput, match=r"rotate\{seed=3\},smooth\{alpha=0.6\}") as caught:
        check_order(make_passes("smooth{alpha=0.6},rotate{seed=3}"))
    text = str(caught.value).rpartition("order is ")[2]
    assert len(parse_pipeline(text)) == 2
