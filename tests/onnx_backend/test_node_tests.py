"""The node tests of the package `onnx`, each captured through the front door."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import check, node_tests, operator, outside

import qcompiler

KNOWN: dict[str, str] = {}
"""Test → why it does not pass. Each of them is refused with a message, and none is wrong."""


def _by_operator() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, case in node_tests().items():
        if outside(case) is None:
            found.setdefault(operator(case), []).append(name)
    return found


CASES = node_tests()
OPERATORS = _by_operator()


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_operator(name: str) -> None:
    wrong = []
    for case in OPERATORS[name]:
        try:
            check(CASES[case])
            assert case not in KNOWN, f"{case} passes: take it off the list"
        except qcompiler.BadInput as error:
            if case not in KNOWN:
                wrong.append(f"{case}: {error}")
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, "\n".join(wrong)


def test_nearly_all_tensor_operators_pass() -> None:
    assert len(KNOWN) <= 0.05 * sum(map(len, OPERATORS.values()))


def test_the_rest_is_refused_with_a_reason() -> None:
    """What is no tensor operator ends in one message that names the operator."""
    for kind in ("control flow", "random numbers", "images in files"):
        case = next(c for c in CASES.values() if outside(c) == kind)
        assert case.model is not None
        with pytest.raises(qcompiler.BadInput, match="does not know"):
            check(case)
