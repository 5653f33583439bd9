"""A test that fails is FAILED; a guest that fails is an ERROR; both say what a reader needs."""

import shlex

import pytest

RAISES = """
    import pytest
    from pytest_vmsandbox import (
        BootError, CommandError, CommandResult, CommandTimeout, ConfigError, GuestLost, ImageError,
        LaunchError, MonitorError, TeardownError, TransferError,
    )

    result = CommandResult(argv=("x",), returncode=1, stdout="said", stderr="cried", duration=0.1)

    def test_x(vm):
        raise {error}
"""


@pytest.mark.parametrize(
    "error",
    [
        "GuestLost('it is gone')",
        "BootError('it does not come up', stage='init', seconds=3)",
        "LaunchError('QEMU does not start')",
        "ImageError('there is none')",
        "MonitorError('no answer')",
        "TeardownError('it cannot be killed')",
    ],
)
def test_a_guest_that_fails_is_an_error(suite, error):
    suite.write(RAISES.format(error=error))
    result = suite.run()
    result.assert_outcomes(errors=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*ERROR at call of test_x*", "ERROR test_suite.py::test_x*"])


def test_a_lost_guest_is_no_expected_failure(suite):
    suite.write("""
        import pytest
        from pytest_vmsandbox import GuestLost

        @pytest.mark.xfail(reason="known")
        def test_lost(vm):
            raise GuestLost("it is gone")

        @pytest.mark.xfail(reason="known")
        def test_known(vm):
            assert False
    """)
    result = suite.run()
    result.assert_outcomes(errors=1, xfailed=1)
    result.stdout.fnmatch_lines(["*pytest_vmsandbox.GuestLost: [[]command[]] it is gone*"])


@pytest.mark.parametrize(
    "error",
    [
        "CommandError('x returned 1', result=result)",
        "CommandTimeout('x did not end', seconds=3)",
        "TransferError('there is no such file')",
        "ConfigError('cpus=0')",
        "AssertionError('no')",
    ],
)
def test_a_test_that_fails_is_failed(suite, error):
    suite.write(RAISES.format(error=error))
    suite.run().assert_outcomes(failed=1)


def test_a_failed_command_shows_both_streams(suite, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    suite.write(RAISES.format(error="CommandError('x returned 1', result=result)"))
    result = suite.run()
    result.stdout.fnmatch_lines(
        ["*x returned 1", "*--- stdout", "*said", "*--- stderr", "*cried", "FAILED*x returned 1*"]
    )


def test_a_guest_that_does_not_come_up_is_an_error_of_the_setup(suite):
    suite.write("""
        import pytest

        @pytest.mark.vm("beta", cpus=13)
        def test_x(vm): pass
    """)
    result = suite.run()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at setup of test_x*", "*[[]kernel[]] beta does not come up"]
    )


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--vm=alpha-*", "--vm=!alpha-2"),
        ("--in-vm", "--vm-isolation=module"),
    ],
    ids=["", "images", "inside"],
)
def test_an_error_tells_how_to_see_it_again(suite, args):
    """The ini file is there again; what was given besides decides where the test runs."""
    suite.write("""
        from pytest_vmsandbox.plugin import RUN

        def test_x(vm, pytestconfig):
            print(*pytestconfig.stash[RUN].hints(), sep="\\n")
    """)
    again = shlex.join(["test_suite.py::test_x[alpha-1]", *args])
    lines = suite.run("-s", *args).outlines
    assert f"reproduce: pytest {again}" in lines


class TestTraceback:
    SOURCE = """
        from pytest_vmsandbox import Hardware

        def test_x():
            helper()

        def helper():
            Hardware().changed({"cpus": 0})  # the line of the test
    """

    def test_shows_the_line_of_the_test_and_not_ours(self, suite):
        suite.write(self.SOURCE)
        text = suite.run().stdout.str()
        assert "the line of the test" in text
        assert "cpus=0 is not a number of CPUs" in text
        assert "spec.py" not in text

    def test_shows_all_with_full_trace(self, suite):
        suite.write(self.SOURCE)
        text = suite.run("--full-trace").stdout.str()
        assert "the line of the test" in text
        assert "spec.py" in text

    def test_hides_causes_too(self, suite):
        suite.write("""
            from pytest_vmsandbox import GuestLost

            def test_x(vm):
                try:
                    int("of a socket")
                except ValueError as error:
                    raise GuestLost("it is gone") from error
        """)
        assert "ValueError:" not in suite.run().stdout.str()
        assert "ValueError:" in suite.run("--full-trace").stdout.str()

    @pytest.mark.parametrize(
        ("text", "is_shown"),
        [
            ("integrity.file_digest(Path('missing'))", False),
            ("open('missing')", True),
            ("subprocess.run(['missing'])", True),
        ],
        ids=["ours", "the test's", "of the standard library"],
    )
    def test_python_s_own_errors_that_a_guest_raises_are_like_ours(self, suite, text, is_shown):
        suite.write(f"""
            import contextlib
            import subprocess
            from pathlib import Path

            from pytest_vmsandbox.cache import integrity

            def test_x():
                with contextlib.ExitStack() as stack:
                    {text}
        """)
        result = suite.run()
        text = result.stdout.str()
        assert "FileNotFoundError" in text
        assert "stack:" in text
        assert "integrity.py" not in text
        assert ("subprocess.py" in text) is ("subprocess.run" in text and is_shown)

    def test_shows_what_failed_in_the_test_before(self, suite):
        suite.write("""
            from pytest_vmsandbox import Hardware

            def test_x():
                try:
                    assert "this" == "failed first"
                finally:
                    try:
                        Hardware().changed({"cpus": 0})
                    finally:
                        Hardware().changed({"memory": "0MiB"})
        """)
        text = suite.run().stdout.str()
        assert "failed first" in text
        assert "cpus=0 is not a number of CPUs" in text
        assert "memory=" in text
        assert "spec.py" not in text

    @pytest.mark.parametrize("chain", ["", " from error"])
    def test_hides_what_failed_within_us(self, suite, chain):
        suite.write(f"""
            from pytest_vmsandbox import GuestLost, plugin

            scope = dict(GuestLost=GuestLost)
            exec(compile(
                '''
            def run():
                try:
                    int("of a socket")
                except ValueError as error:
                    raise GuestLost("it is gone"){chain}
                ''', plugin.__file__, "exec"), scope)

            def test_x():
                try:
                    assert "this" == "failed first"
                finally:
                    scope["run"]()
        """)
        text = suite.run().stdout.str()
        assert "ValueError:" not in text
        assert "failed first" in text
        assert "GuestLost: [command] it is gone" in text

    def test_of_a_failed_setup_is_only_the_text(self, bare):
        bare.write("def test_x(vm): pass")
        result = bare.run_apart("--vm=alpha-1")
        result.assert_outcomes(errors=1)
        text = result.stdout.str()
        assert "contextlib" not in text
        assert "_pytest" not in text
        assert "pytest_vmsandbox/" not in text

    @pytest.mark.parametrize("style", ["long", "short", "line", "native", "no"])
    def test_is_there_in_every_style(self, suite, style):
        suite.write(self.SOURCE)
        result = suite.run(f"--tb={style}")
        result.assert_outcomes(failed=1)
        assert "INTERNALERROR" not in result.stdout.str()

    def test_a_note_is_shown(self, suite):
        suite.write("""
            from pytest_vmsandbox import GuestLost

            def test_x(vm):
                error = GuestLost("it is gone")
                error.add_note("artifacts: over there")
                raise error
        """)
        assert "artifacts: over there" in suite.run().stdout.str()


class TestXdist:
    def test_errors_and_failures_are_told_apart(self, suite):
        suite.write("""
            from pytest_vmsandbox import GuestLost

            def test_a(vm): pass
            def test_b(vm): raise GuestLost("it is gone")
            def test_c(vm): assert False
        """)
        suite.run_apart("-n", "2", "--vm=alpha-*").assert_outcomes(passed=2, errors=2, failed=2)
        boots = [line for line in suite.guests if line.startswith("boot")]
        assert len(boots) == 6
        assert len(suite.guests) == 12

    def test_deselection_agrees_in_all_workers(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.vm("beta")
            def test_a(vm): pass
            def test_b(vm): pass
        """)
        suite.run_apart("-n", "2", "--vm=alpha-*").assert_outcomes(passed=2)
