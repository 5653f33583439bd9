"""`--vm-repeat` and `--vm-noise`: what runs how often, and what is said of it. Guests are fakes."""

import xml.etree.ElementTree as ET

import pytest

from support import inside

SOMETIMES = """
    import pytest
    from pytest_vmsandbox import GuestLost

    def number(request):
        return int(request.node.nodeid.rpartition("#")[2].removesuffix("]"))

    def test_x(vm, request):
        n = number(request)
        assert n % 4, f"of process {n}"
        if n == 5:
            raise ValueError("another one")
        if n == 6:
            raise GuestLost("it is gone")

    def test_plain(): pass
"""


def rates(result):
    """The lines of the summary's section about failure rates."""
    lines = result.outlines
    titles = [n for n, line in enumerate(lines) if "how often tests failed" in line]
    found = []
    for line in lines[titles[0] + 1 :] if titles else ():
        if line.startswith(("vmsandbox: ", "==")):
            break
        found.append(line)
    return found


class TestCounting:
    def test_failures_errors_and_causes(self, suite):
        suite.write(SOMETIMES)
        result = suite.run("--vm-repeat=8")
        result.assert_outcomes(passed=12, failed=3, errors=1)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        assert rates(result) == [
            (
                "test_suite.py::test_x[alpha-1]: failed 3 of 7 (42.9 %, 95 % interval 9.9 to 81.6 %); "
                "1 not counted, because the guest failed"
            ),
            "  2 × AssertionError: of process 4 (first: #4)",
            "  1 × ValueError: another one (first: #5)",
            "  1 × pytest_vmsandbox.GuestLost: [command] it is gone (first: #6)",
            "test_suite.py::test_plain: failed 0 of 8 (0.0 %, 95 % interval 0.0 to 36.9 %)",
        ]
        text = result.stdout.str()
        assert "each test runs 8 times" in text
        assert "of process 8" not in text  # the same cause is shown once
        assert text.count("FAILED test_suite.py") == 2

    def test_a_test_that_always_passes(self, suite):
        suite.write("def test_x(vm): pass")
        result = suite.run("--vm-repeat=10", "--vm=alpha-*")
        result.assert_outcomes(passed=20)
        assert rates(result) == [
            f"test_suite.py::test_x[alpha-{n}]: failed 0 of 10 (0.0 %, 95 % interval 0.0 to 30.8 %)"
            for n in (1, 2)
        ]

    def test_expected_failures_and_skips(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.xfail
            def test_known(vm, request): assert "#2" in request.node.nodeid

            def test_skips(vm): pytest.skip("why")

            @pytest.mark.skip
            def test_never(vm): pass
        """)
        result = suite.run("--vm-repeat=2")
        result.assert_outcomes(xfailed=1, xpassed=1, skipped=4)
        assert rates(result) == [
            "test_suite.py::test_known[alpha-1]: failed 1 of 2 (50.0 %, 95 % interval 1.3 to 98.7 %)",
            "test_suite.py::test_skips[alpha-1]: failed 0 of 0; 2 skipped",
            "test_suite.py::test_never[alpha-1]: failed 0 of 0; 2 skipped",
        ]

    def test_a_guest_lost_after_the_failure(self, suite):
        suite.write("""
            import pytest
            from pytest_vmsandbox import GuestLost

            @pytest.fixture
            def app(vm):
                yield
                raise GuestLost("it is gone")

            def test_x(app): assert 1 == 2
        """)
        result = suite.run("--vm-repeat=2")
        result.assert_outcomes(failed=2, errors=2)
        assert rates(result)[0].startswith("test_suite.py::test_x[alpha-1]: failed 2 of 2 (100.0 %")

    @pytest.mark.parametrize("option", ["-x", "--sw"])
    def test_it_stops_at_the_first_failure(self, suite, option):
        suite.write(SOMETIMES)
        result = suite.run("--vm-repeat=8", "-p", "cacheprovider", "-p", "stepwise", option)
        result.assert_outcomes(passed=3, failed=1)
        assert rates(result)[0] == (
            "test_suite.py::test_x[alpha-1]: failed 1 of 4; 4 did not run, so there is no interval"
        )

    @pytest.mark.parametrize("dist", ["load", "loadscope"])
    def test_with_xdist(self, suite, dist):
        suite.write(SOMETIMES)
        result = suite.run_apart("--vm-repeat=8", "-n2", f"--dist={dist}")
        result.assert_outcomes(passed=12, failed=3, errors=1)
        assert ": failed 3 of 7 (42.9 %" in rates(result)[0]
        assert result.stdout.str().count("FAILED test_suite.py") == 2


class TestTheSameState:
    """No repetition sees another one."""

    def test_each_has_its_own_guest_and_fixtures(self, suite):
        suite.write("""
            import pytest

            made = []

            @pytest.fixture(scope="session")
            def once(vm_factory):
                made.append(1)
                with vm_factory.boot("alpha-2") as guest:
                    yield guest

            class TestIt:
                seen = False

                @pytest.mark.vm(isolation="session")
                def test_a(self, vm, once, tmp_path):
                    assert not self.seen
                    self.seen = True
                    assert not hasattr(vm, "used")
                    assert not hasattr(once, "used")
                    vm.used = once.used = True

            def test_made(): assert len(made) == 3
        """)
        suite.run("--vm-repeat=3").assert_outcomes(passed=6)
        assert [line.split()[0] for line in suite.guests] == ["boot", "boot", "end", "end"] * 3

    def test_of_a_unittest_and_of_the_factory(self, suite):
        suite.write("""
            import unittest
            import pytest

            class TestIt(unittest.TestCase):
                @pytest.fixture(autouse=True)
                def guest(self, vm): self.vm = vm
                def test_a(self): assert self.vm.alive

            def test_b(request):
                with request.getfixturevalue("vm_factory").boot("beta"): pass
        """)
        result = suite.run("--vm-repeat=2")
        result.assert_outcomes(passed=4)
        assert len(suite.guests) == 8
        assert [line.partition(": ")[0] for line in rates(result)] == [
            "test_suite.py::TestIt::test_a",
            "test_suite.py::test_b",
        ]

    def test_of_a_doctest(self, suite):
        suite.write('''
            """
            >>> len(globals().setdefault("seen", [])), number
            (0, 7)
            >>> seen.append(number)
            """

            number = 7
        ''')
        suite.run("--vm-repeat=3", "--doctest-modules").assert_outcomes(passed=3)

    @pytest.mark.parametrize("args", [(), ("-n2",)])
    def test_inside(self, tmp_path_factory, args):
        suite = inside.Suite(tmp_path_factory.mktemp("s"))
        # These guests are processes here, so two of them can fail, however workers share the repetitions.
        suite.write(
            "test_it.py",
            "import os\n\nseen = []\n\ndef test_a():\n    seen.append(1)\n    assert len(seen) == 1\n\n"
            "def test_b():\n    for name in 'ab':\n        try:\n"
            f"            os.mkdir({str(suite.folder)!r} + '/' + name)\n"
            "        except FileExistsError:\n            continue\n        assert not 'the first'\n",
        )
        status, output = suite.run("--in-vm", "--vm-repeat=4", *args)
        assert status == (1 if "failed" in output else 0), output
        assert "test_it.py::test_a[debian-13]: failed 0 of 4 (" in output
        assert "test_it.py::test_b[debian-13]: failed 2 of 4 (" in output
        assert len(suite.guests) == 8


class TestWhatIsRemembered:
    """Users and pytest's cache know tests, not repetitions."""

    def run(self, suite, *args):
        return suite.run_apart("-p", "cacheprovider", "-p", "stepwise", *args)

    @pytest.mark.parametrize("args", [(), ("-n2",)])
    def test_last_failed(self, suite, args):
        suite.write(SOMETIMES)
        self.run(suite, "--vm-repeat=4", *args).assert_outcomes(passed=7, failed=1)
        again = self.run(suite, "--lf", "--collect-only", "-q")
        assert again.outlines[0] == "test_suite.py::test_x[alpha-1]"
        result = self.run(suite, "--lf", "--vm-repeat=3", *args)
        result.assert_outcomes(passed=3)
        assert rates(result)[0].startswith("test_suite.py::test_x[alpha-1]: failed 0 of 3 (")
        result = self.run(suite, "--lf", "--vm-repeat=2")  # none is left, so all run
        result.assert_outcomes(passed=4)

    def test_stepwise(self, suite):
        suite.write(
            "def test_first(vm): pass\n" + "\n".join(line[4:] for line in SOMETIMES.splitlines())
        )
        self.run(suite, "--vm-repeat=4", "--sw").assert_outcomes(passed=7, failed=1)
        self.run(suite, "--vm-repeat=3", "--sw").assert_outcomes(passed=6, deselected=1)

    def test_they_are_not_collected(self, suite):
        suite.write("def test_x(vm): pass")
        assert suite.ids("--vm-repeat=3") == ["test_x[alpha-1]"]

    def test_junit(self, suite):
        suite.write(SOMETIMES)
        suite.run("--vm-repeat=4", "--junitxml=junit.xml")
        cases = [*ET.parse(suite.path / "junit.xml").getroot().iter("testcase")]
        assert [case.get("name") for case in cases] == [
            *(f"test_x[alpha-1-#{n + 1}]" for n in range(4)),
            *(f"test_plain[#{n + 1}]" for n in range(4)),
        ]
        assert [case.find("failure") is not None for case in cases] == [False] * 3 + [True] + [
            False
        ] * 4

    def test_only_the_first_failure_keeps_its_guest(self, suite):
        suite.write("def test_x(vm, request): assert '#1]' in request.node.nodeid")
        suite.run("--vm-repeat=4", "--vm-keep=failed").assert_outcomes(passed=1, failed=3)
        assert [line.split()[:2] for line in suite.guests if line.startswith("keep")] == [
            ["keep", "alpha-1-2"]
        ]

    def test_an_error_tells_how_to_see_it_again(self, suite):
        suite.write("""
            from pytest_vmsandbox.plugin import RUN

            def test_x(vm, pytestconfig): print(*pytestconfig.stash[RUN].hints(), sep="\\n")
        """)
        lines = suite.run("-s", "--vm-repeat=1", "--vm-noise").outlines
        assert (
            "reproduce: pytest 'test_suite.py::test_x[alpha-1]' --vm-repeat=1 --vm-noise" in lines
        )


class TestUsage:
    @pytest.mark.parametrize("value", ["0", "-1", "x", "10001", "1.5"])
    def test_a_wrong_number(self, suite, value):
        suite.write("def test_x(vm): pass")
        assert "use a whole number from 1 to 10000" in suite.usage_error(f"--vm-repeat={value}")

    def test_reruns_would_hide_failures(self, suite):
        suite.write("def test_x(vm): pass")
        args = ["--vm-repeat=2", "-p", "pytest_rerunfailures"]
        assert "--reruns=0" in suite.usage_error(*args, "--reruns=2")
        suite.run(*args, "--reruns=0").assert_outcomes(passed=2)


# The fake notes noise in its guests, instead of stopping processes.
NOISE = """

import importlib


class FakeNoise:
    def __init__(self):
        self.guests = []

    def disturb(self, guest):
        note(guest.config, "noise", guest.name)
        self.guests.append(guest)

    def close(self):
        for guest in self.guests:
            note(guest.config, "quiet", guest.name)


importlib.import_module("pytest_vmsandbox.guests.noise").Noise = FakeNoise
"""


class TestNoise:
    @pytest.fixture
    def noisy(self, suite):
        with (suite.path / "conftest.py").open("a") as file:
            file.write(NOISE)
        return suite

    def test_while_the_function_runs(self, noisy):
        noisy.write("""
            import pytest

            @pytest.fixture
            def app(vm):
                vm.mark = "app"
                yield vm

            def test_x(app, vm_factory):
                with vm_factory.boot("beta"):
                    assert False

            def test_passes(): pass
        """)
        result = noisy.run("--vm-noise")
        result.assert_outcomes(failed=1, passed=1)
        assert noisy.guests == [
            "boot alpha-1-1",
            "noise alpha-1-1",
            "boot beta-2",
            "noise beta-2",
            "end beta-2",
            "quiet alpha-1-1",
            "quiet beta-2",
            "end alpha-1-1",
        ]
        result.stdout.fnmatch_lines(
            [
                "vmsandbox: noise in guests while tests run: stopped at random, for 1 to 50 ms, half of the time",
                "with noise: stopped at random, for 1 to 50 ms, half of the time",
            ]
        )

    def test_with_xdist(self, noisy):
        noisy.write("def test_x(vm): assert False")
        result = noisy.run_apart("--vm-noise", "--vm-repeat=2", "-n2")
        result.assert_outcomes(failed=2)
        lines = result.outlines
        said = "with noise: stopped at random, for 1 to 50 ms, half of the time"
        assert lines.count(said) == 1  # of the first failure
        assert any("how often tests failed (with noise)" in line for line in lines)

    def test_without_it(self, noisy):
        noisy.write("def test_x(vm): assert False")
        result = noisy.run()
        result.assert_outcomes(failed=1)
        assert noisy.guests == ["boot alpha-1-1", "end alpha-1-1"]
        assert "noise" not in result.stdout.str()
