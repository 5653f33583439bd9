"""Scenarios of pytest-bdd."""

from __future__ import annotations

import sys
from typing import Any

from ..apart import keep_apart

keep_apart(globals())


def scenario_of(report: Any) -> Any:
    """What pytest-bdd 8 and newer note of a report beside it; older ones hang it on the report."""
    bdd = sys.modules.get("pytest_bdd.reporting")
    registry = getattr(bdd, "test_report_context_registry", None)
    context = registry.get(report) if registry is not None else None
    return None if context is None else {"scenario": context.scenario, "name": context.name}
