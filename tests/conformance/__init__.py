"""What every PET method must do on every backbone: a table of cases, and behaviours that each are written once.

Try a method of your own (docs/adding_a_method.md)::

    from tests.conformance import Case, check

    check(Case("mine", placements, parameters=lambda sizes: ...), "bart")
"""

import pytest

pytest.register_assert_rewrite("tests.conformance.behaviours")  # so that a failure shows the values

from tests.conformance.behaviours import BEHAVIOURS, IMPOSSIBLE, words  # noqa: E402
from tests.conformance.bench import Bench, Case, Sizes  # noqa: E402

KINDS = ("bart", "t5")


class ConformanceError(AssertionError):
    """A method does not do what every method must."""


def check(case: Case, kind: str) -> None:
    """Try all behaviours on a method.

    Args:
        case: The method.
        kind: ``bart`` or ``t5``.

    Raises:
        ConformanceError: At the first behaviour that fails; names it.
    """
    bench = Bench(case, kind)
    for behaviour in BEHAVIOURS:
        if IMPOSSIBLE.get(behaviour):
            continue
        try:
            behaviour(bench)
        except (Exception, pytest.fail.Exception) as error:
            raise ConformanceError(f"{case.name} on {kind}: it is not so that {words(behaviour)}: {error}") from error


__all__ = ["KINDS", "Bench", "Case", "ConformanceError", "Sizes", "check"]
