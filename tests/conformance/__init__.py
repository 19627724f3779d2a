"""Conformance suite for PET methods on every backbone: a table of cases and a list of behaviours.

Test your own method (docs/adding_a_method.md)::

    from tests.conformance import Case, check

    check(Case("mine", placements, parameters=lambda sizes: ...), "bart")
"""

import pytest

pytest.register_assert_rewrite("tests.conformance.behaviours")  # for values in assertion messages

from tests.conformance.behaviours import BEHAVIOURS, IMPOSSIBLE, words  # noqa: E402
from tests.conformance.bench import Bench, Case, Sizes  # noqa: E402

KINDS = ("bart", "t5")
MORE_KINDS = ("mbart", "t5-v1_1")  # the suite runs a selection of the table on them, and the rest if asked


class ConformanceError(AssertionError):
    """Raised if a method lacks a required behaviour."""


def check(case: Case, kind: str) -> None:
    """Test all behaviours of a method.

    Args:
        case: The method.
        kind: A key of :data:`tests.conformance.bench.TINY`, e.g. ``bart`` or ``t5``.

    Raises:
        ConformanceError: At the first behaviour that fails; the message names it.
    """
    bench = Bench(case, kind)
    for behaviour in BEHAVIOURS:
        if IMPOSSIBLE.get(behaviour):
            continue
        try:
            behaviour(bench)
        except (Exception, pytest.fail.Exception) as error:
            raise ConformanceError(f"{case.name} on {kind}: it is not so that {words(behaviour)}: {error}") from error


__all__ = ["KINDS", "MORE_KINDS", "Bench", "Case", "ConformanceError", "Sizes", "check"]
