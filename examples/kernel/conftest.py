"""Results of KUnit and kselftest as results of pytest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ktap  # beside this file

_results: dict[str, dict[str, ktap.Case]] = {}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of a kernel need one."""
    has_kernel = config.getoption("--vm-kernel") or config.getini("vm_kernel")
    return True if collection_path.name == "test_kernel.py" and not has_kernel else None


@pytest.fixture
def kunit(vm) -> dict[str, ktap.Case]:
    """The suites that the kernel ran when it booted, by name. If its log is not complete, this is an error."""
    if vm.name not in _results:
        _results[vm.name] = {suite.name: suite for suite in ktap.parse(vm.console.text)}
    return _results[vm.name]
