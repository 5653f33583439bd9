"""What takes long is told on the terminal, also while pytest captures what tests write."""

import pytest

# `session.say` is what everything that takes long calls.
TESTS = """
    import os

    import pytest

    from pytest_vmsandbox.plugin import RUN

    @pytest.fixture
    def slow(pytestconfig):
        print("printed before")
        pytestconfig.stash[RUN].say("preparing it")
        os.system("echo printed after")

    def test_fails(slow):
        raise AssertionError

    def test_reads_what_it_writes(capfd, slow):
        assert capfd.readouterr().out.splitlines() == ["printed before", "printed after"]
"""
LINE = "vmsandbox: preparing it"


@pytest.mark.parametrize("how", [(), ("-p", "no:capture", "-k", "fails")], ids=["", "no capture"])
def test_progress(suite, how):
    suite.write(TESTS)
    result = suite.run_apart(*how)
    progress, failures = result.stdout.str().split("= FAILURES =")
    assert progress.count(LINE) == result.parseoutcomes().get("passed", 0) + 1
    assert LINE not in failures
    assert progress.splitlines().count(LINE) == progress.count(LINE)  # each has a line of its own


def test_a_worker_of_xdist_has_no_terminal_but_its_errors_output(suite):
    suite.write(TESTS)
    result = suite.run_apart("-n1")
    result.assert_outcomes(passed=1, failed=1)
    assert result.stderr.str().splitlines() == [LINE, LINE]
    assert LINE not in result.stdout.str()
