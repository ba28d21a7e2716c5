"""The node tests of the package `onnx`, each captured through the front door."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from harness import DIGITS, REFUSED, check, matching, node_tests, operator, outside

import qcompiler


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
    """Each test passes, or does not for the reason that is listed."""
    wrong = []
    for case in OPERATORS[name]:
        refused, digits = matching(case, REFUSED), matching(case, DIGITS)
        try:
            check(CASES[case])
        except qcompiler.BadInput as error:
            if not refused:
                wrong.append(f"{case}: {error}")
        except AssertionError as error:
            if not digits or "Not equal to tolerance" not in str(error):
                wrong.append(f"{case}: {error}")
        else:
            if refused or (digits and "bf16" not in case):
                wrong.append(f"{case} passes: take it off the list")
    assert not wrong, "\n".join(wrong)


def test_nearly_all_tensor_operators_pass() -> None:
    names = [name for found in OPERATORS.values() for name in found]
    left = [name for name in names if matching(name, REFUSED) or matching(name, DIGITS)]
    assert len(left) <= 0.05 * len(names)


def test_the_rest_is_refused_with_a_reason() -> None:
    """What is no tensor operator ends in one message that names the operator."""
    for kind in ("control flow", "random numbers", "images in files"):
        case = next(c for c in CASES.values() if outside(c) == kind)
        assert case.model is not None
        with pytest.raises(qcompiler.BadInput, match="does not know"):
            check(case)
