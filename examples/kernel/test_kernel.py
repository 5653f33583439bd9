"""Tests of a kernel that has KUnit: its suites, a suite that is a module, and kselftests.

Each result of a suite is a subtest, because nobody knows their names before the kernel has run.
"""

from __future__ import annotations

import os
from pathlib import Path

import ktap
import pytest

SUITES = [
    "ext4_inode_test",
    "kunit-resource-test",
    "list-kunit-test",
    "hlist",
    "bits-test",
    "cmdline",
]
SELFTESTS = Path(os.environ.get("SELFTESTS", "selftests")).expanduser()

pytestmark = pytest.mark.vm("tiny", isolation="module")


@pytest.mark.parametrize("name", SUITES)
def test_suite_of_the_kernel(kunit, name, subtests):
    kunit[name].report(subtests)


def test_no_other_suite_has_failed(kunit, subtests):
    for name in kunit.keys() - {*SUITES}:
        kunit[name].report(subtests)


@pytest.mark.vm(isolation="test")
def test_suite_in_a_module(vm, subtests):
    vm.run(["dmesg", "-c"])
    vm.run(["modprobe", "kunit-example-test"])
    for suite in ktap.parse(vm.run(["dmesg"]).stdout):
        suite.report(subtests)


@pytest.mark.parametrize("name", ["sas", "get_size"])
def test_kselftest(vm, name, subtests):
    vm.push(SELFTESTS / name, f"/tmp/{name}")
    result = vm.run([f"/tmp/{name}"], check=False, timeout=60)
    for case in ktap.parse(result.stdout):
        case.report(subtests)
    assert result.returncode in (0, 4), result.stderr  # 4: skipped
