"""Pipelines as text, options, recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler import BadInput, load_recipe
from qcompiler.recipe import parse_recipe, recipe_names
from qcompiler.registry import make_passes
from qcompiler.spec import PassSpec, parse_pipeline, print_pipeline

names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
scalars = st.one_of(
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=12),
)
values = st.one_of(scalars, st.lists(scalars, max_size=3).map(tuple))
specs = st.builds(PassSpec, names, st.dictionaries(names, values, max_size=3))


@given(st.lists(specs, min_size=1, max_size=4).map(tuple))
def test_text_parses_back(pipeline: tuple[PassSpec, ...]) -> None:
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("canonicalise", "did you mean 'canonicalize'"),
        ("smooth{alhpa=0.5}", "did you mean 'alpha'"),
        ("smooth{alpha=yes}", "alpha is float"),
        ("smooth{alpha=0.5 alpha=0.6}", "given twice"),
        ("smooth{alpha}", "expected '='"),
        ("smooth{alpha=0.5", "the end"),
        ("smooth,,fold", "the name of a pass"),
        ("", "the name of a pass"),
    ],
)
def test_bad_text_is_one_clear_error(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make_passes(text)


def test_passes_print_as_they_were_written() -> None:
    text = 'smooth{alpha=0.7},assign{weight=int4:group64 exceptions=["*head*=int8:channel"]}'
    passes = make_passes(text)
    assert make_passes(",".join(map(str, passes))) == passes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.about and [p.name for p in recipe.passes()][-1] == "quantize"
    steps = {s.name for s in recipe.specs}
    assert {"smooth", "rotate", "learn_rotation"} & steps == {
        *(["smooth"] if any(w in name for w in ("smooth", "rotated", "learned", "awq")) else []),
        *(["rotate"] if any(word in name for word in ("rotated", "learned")) else []),
        *(["learn_rotation"] if "learned" in name else []),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[[pas]]\nname = "fold"', "did you mean 'pass'"),
        ('[[pass]]\nnme = "fold"', "has no name"),
        ('[[pass]]\nname = "smooth"\nalfa = 1.0', "did you mean 'alpha'"),
        ("[[pass]", "no TOML"),
        ('about = "x"', "no \\[\\[pass"),
    ],
)
def test_a_bad_recipe_is_refused_before_any_work(text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        parse_recipe(text, "mine")


def test_recipe_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[[pass]]\nname = "smooth"\nalpha = 1\n')
    assert str(load_recipe(file)) == "smooth{alpha=1}"
    with pytest.raises(BadInput, match="did you mean 'w8a16'"):
        load_recipe("w8a61")
