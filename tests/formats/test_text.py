"""Formats as text, and what is no format."""

from __future__ import annotations

import pytest
from all_formats import ALONE, ELEMENTS, formats
from hypothesis import given

from qcompiler import BadInput, QFormat
from qcompiler.formats import ALIASES


@given(formats())
def test_text_parses_back(fmt: QFormat) -> None:
    assert QFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize("name", [*ELEMENTS, *ALONE, "codebook4"])
def test_an_element_alone(name: str) -> None:
    for text in (name, f"{name}:unscaled", f"{name}:unscaled:planes"):
        fmt = QFormat.parse(text)
        assert QFormat.parse(str(fmt)) == fmt


@pytest.mark.parametrize("name", ALIASES)
def test_names(name: str) -> None:
    fmt = QFormat.parse(name)
    assert QFormat.parse(str(fmt)) == fmt
    assert QFormat.parse(f"{name}:dynamic").dynamic


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("int9:channel", "int8"),
        ("uint16:channel", "uint8"),
        ("fp8_e4m4:channel", "fp8_e4m3"),
        ("log8:tensor", "log4"),
        ("int8:chanel", "channel"),
        ("int8:dynamic", "names no block"),
        ("int4:group0", "positive"),
        ("int4:group32:channel", "says twice what its block is"),
        ("int4:channel:asym:full", "full range already"),
        ("int4:channel:full:mirrored", "in place of `full`"),
        ("uint4:channel:mirrored", "signed integers"),
        ("int4:group32:mirrored:scale(e8m0)", "have signs"),
        ("nf4:channel:asym", "has no zero point"),
        ("int1:channel", "write `binary`"),
        ("int4:channel:clip0.5", "of a dynamic format"),
        ("int4:token:dynamic:clip2", "between 0 and 1"),
        ("int4:group32:unscaled", "unscaled int4 has no block"),
        ("fp16:channel", "unscaled fp16 has no block"),
        ("codebook4:group32", "one table for each channel"),
        ("codebook4:channel:scale(fp16)", "no scales of its own"),
        ("int4:group32:scale(codebook4:channel)", "plain format"),
        ("int4:group32:scale(int8:token:dynamic)", "plain format"),
        ("int4:group32:scale(fp17)", "fp4_e2m1"),
        ("int4:group32:scale(", "scale"),
        ("", "int4"),
    ],
)
def test_bad_text_says_what_is_right(text: str, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        QFormat.parse(text)
