"""The reader of KTAP in `examples/kernel`, on logs of a real kernel and on what can go wrong."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/kernel"


def _loaded():
    spec = importlib.util.spec_from_file_location("example_ktap", EXAMPLE / "ktap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ktap = _loaded()
NESTED = """\
[    1.000000] Linux version 6
[    1.000000] KTAP version 1
[    1.000000] 1..2
[    1.000000]     KTAP version 1
[    1.000000]     # Subtest: one
[    1.000000]     1..3
[    1.000000]     ok 1 good
[    1.000000]     # bad: EXPECTATION FAILED at lib/one.c:7
[    1.000000]     Expected a == b
[    1.000000]     not ok 2 bad
[    1.000000]     ok 3 left out # SKIP no such hardware
[    1.000000] # one: pass:1 fail:1 skip:1 total:3
[    1.000000] not ok 1 one
[    1.000000]     KTAP version 1
[    1.000000]     # Subtest: two
[    1.000000]     1..1
[    1.000000]         KTAP version 1
[    1.000000]         # Subtest: deep
[    1.000000]         ok 1 - a case, with words
[    1.000000] random: crng init done
[    1.000000]         ok 2 another # XFAIL a known bug
[    1.000000]     ok 1 deep
[    1.000000] not ok 2 two
[    1.000000] Run /init as init process
"""


def recorded(name):
    return (EXAMPLE / "recorded" / f"{name}.txt").read_text()


def leaves(log):
    return {name: case for case in ktap.parse(log) for name, case in case.leaves()}


@pytest.mark.parametrize(
    ("name", "tops", "count"),
    [("boot", 11, 100), ("module", 1, 4), ("sas", 3, 3), ("get_size", 1, 1)],
)
def test_logs_of_a_real_kernel(name, tops, count):
    assert len(ktap.parse(recorded(name))) == tops
    found = leaves(recorded(name))
    assert len(found) == count
    assert all(case.is_ok for case in found.values())


@pytest.mark.parametrize("name", ["boot", "module", "sas"])
def test_a_log_that_ends_too_early(name):
    lines = recorded(name).splitlines()
    last = max(n for n, line in enumerate(lines) if re.search(r"\bok \d+ ", line))
    for end in range(last):
        with pytest.raises(ktap.KTAPError):
            ktap.parse("\n".join(lines[: end + 1]))


@pytest.mark.parametrize("name", ["boot", "module", "sas"])
def test_a_result_that_is_lost(name):
    lines = recorded(name).splitlines()
    for number, line in enumerate(lines):
        if re.search(r"^\S*[^#]*\bok \d+ ", line):
            with pytest.raises(ktap.KTAPError):
                ktap.parse("\n".join([*lines[:number], *lines[number + 1 :]]))


def test_results_below_results():
    found = leaves(NESTED)
    assert [*found] == [
        *("one/good", "one/bad", "one/left out"),
        *("two/deep/a case, with words", "two/deep/another"),
        "two",  # it has failed, and none of its results explains why
    ]
    assert (found["one/left out"].directive, found["one/left out"].reason) == (
        "SKIP",
        "no such hardware",
    )
    assert "    Expected a == b" in found["one/bad"].said


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("", "no results"),
        ("Linux version 6\nok then\n", "no results"),
        ("KTAP version 1\n1..1\n", "1 results were announced, and 0 came"),
        ("KTAP version 1\n1..1\nok 1 a\nBail out! no memory\n", "Bail out! no memory"),
        ("KTAP version 1\nok 1 a\n", "is not announced"),
        (
            "KTAP version 1\n1..2\nok 1 a\nKTAP version 1\n1..1\nok 1 a\n",
            "2 results were announced",
        ),
        (NESTED.replace("    ok 3 left", "    ok 4 left"), "result 3 is missing"),
        (NESTED.replace("total:3", "total:4"), "«one» has 3 results, and counts 4"),
    ],
)
def test_logs_that_show_not_all_results(log, why):
    with pytest.raises(ktap.KTAPError, match=why):
        ktap.parse(log)


def test_a_skipped_program():
    (case,) = ktap.parse("TAP version 13\n1..0 # SKIP needs root\n")
    assert (case.directive, case.reason) == ("SKIP", "needs root")


def test_as_results_of_pytest(pytester, monkeypatch):
    """A failed case fails, a skipped one is skipped; a truncated log is an error."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(ktap=(EXAMPLE / "ktap.py").read_text())
    (pytester.path / "log.txt").write_text(NESTED)
    pytester.makepyfile(
        test_it="""
        from contextlib import contextmanager
        from pathlib import Path

        import ktap
        import pytest

        class Subtests:
            outcomes = []

            @contextmanager
            def test(self, name):
                try:
                    yield
                    self.outcomes.append((name, "passed"))
                except (pytest.skip.Exception, pytest.xfail.Exception) as error:
                    self.outcomes.append((name, f"{type(error).__name__}: {error}"))
                except pytest.fail.Exception as error:
                    self.outcomes.append((name, f"failed: {error}"))

        @pytest.fixture
        def log():
            return ktap.parse(Path("log.txt").read_text())

        @pytest.fixture
        def half():
            return ktap.parse(Path("log.txt").read_text().partition("ok 1 deep")[0])

        def test_it(log):
            for case in log:
                case.report(Subtests())
            outcomes = dict(Subtests.outcomes)
            assert outcomes["one/good"] == "passed"
            assert outcomes["one/bad"].startswith("failed: ")
            assert "Expected a == b" in outcomes["one/bad"]
            assert outcomes["one/left out"] == "Skipped: no such hardware"
            assert outcomes["two/deep/another"] == "XFailed: a known bug"
            assert outcomes["two"].startswith("failed: ")

        def test_half(half):
            pass
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*KTAPError*"])
