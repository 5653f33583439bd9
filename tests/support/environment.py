"""The environment of a pytest that a test starts as a user would."""

from __future__ import annotations

import os

# For pytests that have nothing to do with hypothesis: they would import it to print their summary,
# which takes longer than all else of their start.
WITHOUT_HYPOTHESIS = ("-p", "no:hypothesispytest")


def without_ours(*more: str) -> dict[str, str]:
    """This process's variables, but for those of a run of pytest, and of coverage.

    Args:
        more: what the names of further variables begin with that are left out.
    """
    ours = ("PYTEST_", "COV", *more)
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}
