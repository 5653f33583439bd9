"""What `vm`, `vm_factory` and `vm_artifacts` do, told by a fake that boots guests."""

from pathlib import Path
from typing import ClassVar

import pytest
from _pytest.config import default_plugins, essential_plugins

from support.junit import properties


def test_each_test_gets_a_guest_of_its_own(suite):
    suite.write("""
        def test_a(vm): assert vm.alive and vm.image == "alpha-1"
        def test_b(vm): assert vm.name == "alpha-1-2"
    """)
    suite.run().assert_outcomes(passed=2)
    assert suite.guests == ["boot alpha-1-1", "end alpha-1-1", "boot alpha-1-2", "end alpha-1-2"]


def test_a_suite_without_guests_starts_none(suite):
    suite.write("def test_a(): pass")
    suite.run().assert_outcomes(passed=1)
    assert suite.guests == []


class TestHardware:
    def test_the_closest_marker_wins_for_each_argument(self, suite):
        suite.write("""
            import pytest

            pytestmark = pytest.mark.vm("alpha-*", memory="1GiB", cpus=2)

            @pytest.mark.vm(memory="2GiB", network="nat")
            class TestIt:
                @pytest.mark.vm(cpus=4)
                def test_a(self, vm): pass

                @pytest.mark.vm("beta")
                def test_b(self, vm): pass

            def test_c(vm): pass
        """)
        suite.run("--vm=all").assert_outcomes(passed=5)
        boots = [line.split() for line in suite.guests if line.startswith("boot")]
        # The order of the tests, and so the number in a guest's name, is pytest's.
        assert {" ".join([name.rpartition("-")[0], *rest]) for _, name, *rest in boots} == {
            "alpha-1 cpus=4 memory=2GiB network=nat",
            "alpha-1 cpus=2 memory=1GiB",
            "alpha-2 cpus=4 memory=2GiB network=nat",
            "alpha-2 cpus=2 memory=1GiB",
            "beta cpus=2 memory=2GiB network=nat",
        }

    def test_of_two_markers_at_one_test_the_nearer_one_wins(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.vm(cpus=1)
            @pytest.mark.vm(cpus=2)
            def test_a(vm): pass
        """)
        suite.run().assert_outcomes(passed=1)
        assert suite.guests[0] == "boot alpha-1-1 cpus=2"


class TestSkipAndXfail:
    def test_reasons_add_up(self, suite):
        suite.write("""
            import pytest

            pytestmark = pytest.mark.vm(skip={"alpha-1": "no nftables"}, xfail={"b*": "known"})

            @pytest.mark.vm(skip={"alpha-2": "too old"})
            def test_a(vm): assert vm.image == "alpha-1"
        """)
        result = suite.run("--vm=alpha-*", "--vm=beta", "-rsx")
        result.assert_outcomes(skipped=2, xfailed=1)
        text = result.stdout.str()
        assert "no nftables" in text
        assert "too old" in text
        assert "test_a[beta] - known" in text
        assert [line for line in suite.guests if line.startswith("boot")] == ["boot beta-1"]

    def test_the_closest_reason_is_told(self, suite):
        suite.write("""
            import pytest

            pytestmark = pytest.mark.vm(skip={"alpha-*": "far"})

            @pytest.mark.vm(skip={"alpha-1": "near"})
            def test_a(vm): pass
        """)
        result = suite.run("-rs")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(["SKIPPED*near"])


class TestMarksAddedLate:
    """By hooks that see the tests after us, and by fixtures of a test that already runs."""

    def add(self, suite, mark):
        suite.pytester.makepyfile(
            late=f"""
            import pytest

            def pytest_collection_modifyitems(items):
                for item in items:
                    item.add_marker({mark})
        """
        )
        suite.pytester.syspathinsert()
        return ["-p", "late"]

    def test_hardware(self, suite):
        suite.write("def test_a(vm): pass")
        suite.run(*self.add(suite, "pytest.mark.vm(memory='1GiB')")).assert_outcomes(passed=1)
        assert suite.guests[0] == "boot alpha-1-1 memory=1GiB"

    def test_marks_with_arguments_that_cannot_be_compared(self, suite):
        """As arrays of NumPy."""
        suite.write("""
            import pytest

            class Array:
                def __eq__(self, other): raise ValueError("ambiguous")
                __hash__ = None

            pytestmark = pytest.mark.data(Array())

            @pytest.fixture(autouse=True)
            def more(request):
                request.node.add_marker(pytest.mark.data(Array()))

            @pytest.mark.data(Array())
            def test_a(vm): pass
        """)
        suite.run("-omarkers=data").assert_outcomes(passed=1)

    @pytest.mark.parametrize("how", [(), ("--in-vm",)], ids=["here", "inside"])
    def test_a_skip(self, suite, how):
        suite.write("def test_a(): assert False" if how else "def test_a(vm): assert False")
        late = self.add(suite, "pytest.mark.vm(skip={'alpha-*': 'too late'})")
        result = suite.run("-rs", *late, *how)
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(["SKIPPED*too late"])

    def test_by_a_fixture_of_the_test(self, suite):
        suite.write("""
            import pytest

            @pytest.fixture
            def small(request):
                request.node.add_marker(pytest.mark.vm(memory="1GiB"))
                return request.getfixturevalue("vm")

            def test_a(small): pass
        """)
        suite.run().assert_outcomes(passed=1)
        assert suite.guests[0] == "boot alpha-1-1 memory=1GiB"


def test_a_parameter_s_marks_count(suite):
    suite.write("""
        import pytest

        @pytest.mark.parametrize("x", [1, pytest.param(2, marks=pytest.mark.vm(cpus=2))])
        def test_a(vm, x): pass

        @pytest.mark.parametrize("x", [pytest.param(3, marks=pytest.mark.vm(colour="red"))])
        def test_b(vm, x): pass
    """)
    assert "test_b[alpha-1-3]: pytest.mark.vm has no argument 'colour'" in suite.usage_error()


class TestIsolation:
    def test_a_guest_is_the_same_however_its_memory_is_written(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.vm(isolation="session", memory="1GiB")
            def test_a(vm): pass

            @pytest.mark.vm(isolation="session", memory="1024MiB", user="root")
            def test_b(vm): pass
        """)
        suite.run().assert_outcomes(passed=2)
        assert suite.guests == ["boot alpha-1-1 memory=1GiB", "end alpha-1-1"]

    def test_a_guest_is_another_one_on_other_networks(self, suite):
        suite.write("""
            import pytest

            pytestmark = pytest.mark.vm(networks=["lan", "wan"])

            def test_a(vm): pass

            @pytest.mark.vm(isolation="session")
            def test_b(vm): pass

            @pytest.mark.vm(isolation="session", networks="lan")
            def test_c(vm): pass

            @pytest.mark.vm(isolation="session", networks=("lan", "wan"))
            def test_d(vm): pass
        """)
        suite.run().assert_outcomes(passed=4)
        assert suite.guests == [
            *("network lan", "network wan", "boot alpha-1-1 on lan on wan"),
            *("end alpha-1-1", "network ends wan", "network ends lan"),
            *("network lan", "network wan", "boot alpha-1-2 on lan on wan"),
            *("network lan", "boot alpha-1-3 on lan"),
            *("end alpha-1-3", "network ends lan"),
            *("end alpha-1-2", "network ends wan", "network ends lan"),
        ]

    SOURCE = """
        import pytest

        pytestmark = pytest.mark.vm(isolation={isolation!r})
        names = []

        def test_a(vm): names.append(vm.name)
        def test_b(vm): names.append(vm.name)

        @pytest.mark.vm(cpus=2)
        def test_c(vm): names.append(vm.name)

        def test_d(vm):
            assert names == {names!r}
            vm.alive = {alive!r}

        def test_e(vm):
            assert vm.name == {last!r}
    """

    def write(self, suite, isolation, names, last, *, alive=True, name="test_suite"):
        source = self.SOURCE.format(isolation=isolation, names=names, last=last, alive=alive)
        suite.write(source, name)

    def test_a_guest_of_a_module(self, suite):
        self.write(suite, "module", ["alpha-1-1", "alpha-1-1", "alpha-1-2"], "alpha-1-1")
        self.write(
            suite, "module", ["alpha-1-3", "alpha-1-3", "alpha-1-4"], "alpha-1-3", name="test_two"
        )
        suite.run().assert_outcomes(passed=10)
        assert len(suite.guests) == 8
        assert suite.guests.index("end alpha-1-1") < suite.guests.index("boot alpha-1-3")

    def test_a_guest_of_a_session(self, suite):
        names = ["alpha-1-1", "alpha-1-1", "alpha-1-2"]
        self.write(suite, "session", names, "alpha-1-1")
        self.write(suite, "session", names, "alpha-1-1", name="test_two")
        suite.run().assert_outcomes(passed=10)
        assert len(suite.guests) == 4

    def test_a_lost_guest_is_replaced(self, suite):
        self.write(
            suite, "module", ["alpha-1-1", "alpha-1-1", "alpha-1-2"], "alpha-1-3", alive=False
        )
        suite.run().assert_outcomes(passed=5)
        assert suite.guests.index("end alpha-1-1") < suite.guests.index("boot alpha-1-3 ".strip())

    def test_a_guest_for_each_image(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.vm(isolation="session")
            def test_a(vm): pass
            @pytest.mark.vm(isolation="session")
            def test_b(vm): pass
        """)
        suite.run("--vm=alpha-*").assert_outcomes(passed=4)
        assert len(suite.guests) == 4


def test_a_factory_boots_guests_for_fixtures_of_any_scope(suite):
    suite.write("""
        import pytest

        @pytest.fixture(scope="session")
        def two(vm_factory):
            with vm_factory.boot("alpha-1") as a, vm_factory.boot("beta", cpus=2) as b:
                yield a, b

        def test_x(two): assert [it.image for it in two] == ["alpha-1", "beta"]
    """)
    suite.run().assert_outcomes(passed=1)
    assert suite.guests == ["boot alpha-1-1", "boot beta-2 cpus=2", "end beta-2", "end alpha-1-1"]


class TestArtifacts:
    SOURCE = """
        def test_good(vm, vm_artifacts):
            (vm_artifacts / "note").write_text("good")

        def test_bad(vm, vm_artifacts):
            assert vm_artifacts.is_dir()
            (vm_artifacts / "note").write_text("bad")
            assert False
    """

    @pytest.mark.parametrize("how", ["option", "ini"])
    def test_those_of_failed_tests_stay(self, suite, how):
        suite.write(self.SOURCE)
        if how == "ini":
            with (suite.path / "pytest.ini").open("a") as file:
                print("vm_artifacts_dir = kept", file=file)
        suite.run(*(["--vm-artifacts=kept"] if how == "option" else [])).assert_outcomes(
            passed=1, failed=1
        )
        (folder,) = (suite.path / "kept").iterdir()
        assert folder.name == "test_suite.py-test_bad-alpha-1"
        assert (folder / "note").read_text() == "bad"
        assert (folder / "alpha-1-2" / "screenshot.png").read_bytes() == b"a picture"
        assert (folder / "alpha-1-2" / "processes.txt").read_text() == "those of alpha-1-2"

    def test_without_a_folder_they_lie_with_pytests_own(self, suite):
        suite.write(self.SOURCE)
        suite.run("--basetemp=base").assert_outcomes(passed=1, failed=1)
        (note,) = (suite.path / "base").glob("vm-artifacts0/*/note")
        assert note.read_text() == "bad"

    @pytest.mark.parametrize("trouble", ["full", "removed"])
    def test_where_none_can_be_written_the_test_has_its_own_failure(self, suite, trouble):
        does = {
            "full": "run.artifacts.of_test = lambda _: os.write(os.open('/dev/full', os.O_WRONLY), b'x')",
            "removed": "shutil.rmtree('kept')",
        }[trouble]
        suite.write(f"""
            import os, shutil

            from pytest_vmsandbox.plugin import RUN

            def test_good(vm, pytestconfig):
                run = pytestconfig.stash[RUN]
                {does}
            def test_bad(vm): assert False, "why"
            def test_block(vm_factory):
                with vm_factory.boot("alpha-1"): assert False, "why"
            def test_hint(vm, pytestconfig):
                assert any(line.startswith("reproduce:") for line in pytestconfig.stash[RUN].hints())
        """)
        result = suite.run("--vm-artifacts=kept")
        result.assert_outcomes(passed=2, failed=2)
        told = [line for line in result.outlines if "missing or not complete" in line]
        assert len(told) == (1 if trouble == "full" else 0)

    def test_no_part_of_a_file_is_left(self, suite):
        suite.write("""
            from pytest_vmsandbox.core.errors import MonitorError
            from pytest_vmsandbox.plugin import RUN

            def half(path):
                path.write_bytes(b"half")
                raise MonitorError("no more")

            def test_a(vm):
                vm.screenshot = half
                assert False

            def test_b(vm, pytestconfig):
                pytestconfig.stash[RUN]._gatherer._ask = lambda _: {"text": b"no str"}
                assert False
        """)
        suite.run("--vm-artifacts=kept").assert_outcomes(failed=2)
        names = sorted(file.name for file in suite.path.glob("kept/*/*/*"))
        assert names == ["console.log", "console.log", "processes.txt", "screenshot.png"]

    def test_a_failure_that_a_test_expects_is_not_looked_at_instead_of_its_own(self, suite):
        suite.write("""
            import pytest

            from pytest_vmsandbox.plugin import RUN

            def test_a(vm, pytestconfig):
                run, seen = pytestconfig.stash[RUN], []
                run._gatherer._ask = lambda guest: {"text": guest.alive}
                vm.alive = "expected"
                run.guest_restoring(vm.name, ValueError())
                vm.alive = "failed"
                raise KeyError
        """)
        suite.run("--vm-artifacts=kept").assert_outcomes(failed=1)
        (text,) = suite.path.glob("kept/*/*/text")
        assert text.read_text() == "failed"

    def test_a_failed_setup_or_teardown_counts_as_failed(self, suite):
        suite.write("""
            import pytest

            @pytest.fixture
            def late(vm_artifacts):
                yield
                (vm_artifacts / "note").touch()
                assert False

            def test_x(late): pass
        """)
        suite.run("--vm-artifacts=kept").assert_outcomes(passed=1, errors=1)
        assert list((suite.path / "kept").glob("*/note"))

    SEVERAL = """
        import pytest

        @pytest.fixture
        def wrong(vm):
            assert False
            yield

        def test_good(vm): pass
        def test_bad(vm): assert False
        def test_setup(wrong): pass
        def test_without(): assert False

        def test_a_block(vm_factory):
            with vm_factory.boot("alpha-1") as guest:
                assert False

        @pytest.mark.vm(isolation="module")
        @pytest.mark.parametrize("number", [1, 2])
        def test_shared(vm, number): assert False
    """
    SHOWN: ClassVar = {
        "test_bad[alpha-1]": "alpha-1-2",
        "test_setup[alpha-1]": "alpha-1-3",
        "test_a_block": "alpha-1-4",
        "test_shared[alpha-1-1]": "alpha-1-5",
        "test_shared[alpha-1-2]": "alpha-1-5",
    }

    @pytest.mark.parametrize("place", ["here", "xdist"])
    def test_what_every_failure_shows(self, suite, place):
        suite.write(self.SEVERAL)
        args = "--vm-artifacts=kept", "--junitxml=junit.xml"
        result = suite.run(*args) if place == "here" else suite.run_apart(*args, "-n1")
        result.assert_outcomes(passed=1, failed=5, errors=1)
        found = properties(suite.path / "junit.xml")
        assert found["test_good[alpha-1]"] == {"vm": "alpha-1"}
        assert found["test_without"] == {}
        text = result.stdout.str()
        for name, guest in self.SHOWN.items():
            folder = Path(found[name]["vm_artifacts"])
            assert (folder / guest / "processes.txt").read_text() == f"those of {guest}"
            assert (folder / guest / "console.log").read_text() == f"{guest} boots"
            assert text.count(f"artifacts: {folder}\n") == 1
            assert found[name].get("vm", "alpha-1") == "alpha-1"
        kept = [*suite.path.joinpath("kept").rglob("*")]
        assert len([it for it in kept if it.suffix == ".txt"]) == 5
        mine = [it for it in kept if it.name != "console.log"]  # which the fake has written
        assert [it for it in mine if it.stat().st_mode & 0o077] == []

    def test_many_failures_take_no_longer(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.vm(isolation="module")
            @pytest.mark.parametrize("number", range(22))
            def test_x(vm, number): assert False
        """)
        result = suite.run("--vm-artifacts=kept")
        result.assert_outcomes(failed=22)
        assert len([*suite.path.glob("kept/*/*/processes.txt")]) == 20
        assert len([*suite.path.glob("kept/*/*/screenshot.png")]) == 22
        assert result.stdout.str().count("the first 20 failed tests were asked") == 1


class TestLogsOfGuestsThatTestsShare:
    def test_have_no_folder_before_something_is_put_into_it(self, suite):
        suite.write("""
            from pathlib import Path

            def test_good(vm):
                (logs,) = Path("kept").iterdir()
                assert logs.name.startswith("guests-")
        """)
        suite.run("--vm-artifacts=kept").assert_outcomes(passed=1)

    @pytest.mark.parametrize("isolation", ["module", "session"])
    def test_are_kept_with_each_test_that_fails(self, suite, isolation):
        suite.write(f"""
            import pytest

            pytestmark = pytest.mark.vm(isolation="{isolation}")

            def test_a(vm): pass

            def test_b(vm, vm_artifacts):
                assert (vm_artifacts / vm.name / "console.log").read_text() == "alpha-1-1 boots"
                assert False

            def test_c(vm): pass
            def test_d(vm): assert False

            @pytest.mark.vm(isolation="test")
            def test_own(vm): assert False
        """)
        suite.run("--vm-artifacts=kept").assert_outcomes(passed=2, failed=3)
        kept = suite.path / "kept"
        name = "test_suite.py-test_{}-alpha-1"
        assert sorted(it.name for it in kept.iterdir()) == [
            name.format(it) for it in ("b", "d", "own")
        ]
        for test in "bd":
            (folder,) = (kept / name.format(test)).iterdir()
            assert (folder / "console.log").read_text() == "alpha-1-1 boots"
            assert (folder / "screenshot.png").read_bytes() == b"a picture"
        assert (kept / name.format("own") / "alpha-1-2" / "console.log").exists()

    def test_of_a_fixture_of_the_users(self, suite):
        suite.write("""
            import pytest
            from pytest_vmsandbox.plugin import RUN

            @pytest.fixture(scope="module")
            def mine(vm_factory):
                with vm_factory.boot("alpha-1") as guest:
                    yield guest

            def test_a(mine): pass
            def test_b(): assert False
            def test_c(mine): assert False

            def test_d(mine, pytestconfig):
                note = pytestconfig.stash[RUN].hints()[0].removeprefix("artifacts: ")
                with open(note + "/alpha-1-1/console.log") as file:
                    assert file.read() == "alpha-1-1 boots"
        """)
        suite.run("--vm-artifacts=kept").assert_outcomes(passed=2, failed=2)
        logs = [path.relative_to(suite.path) for path in suite.path.glob("kept/**/console.log")]
        assert [str(it) for it in logs] == ["kept/test_suite.py-test_c/alpha-1-1/console.log"]

    def test_of_a_boot_that_fails(self, suite):
        suite.write("""
            import pytest

            @pytest.mark.vm("beta", cpus=13)
            def test_a(vm): pass
            def test_b(vm): assert False
        """)
        suite.run("--vm=beta", "--vm-artifacts=kept").assert_outcomes(errors=1, failed=1)
        logs = sorted(path.parent.name for path in suite.path.glob("kept/**/console.log"))
        assert logs == ["beta-1", "beta-2"]


SEES_HOOKS = """
seen = []

def pytest_vmsandbox_images(config):
    return []

def pytest_vmsandbox_qemu_args(config, spec):
    return []

def pytest_vmsandbox_guest_ready(config, guest):
    seen.append(f"ready {guest.name}")

def pytest_vmsandbox_guest_stopping(config, guest, failed):
    seen.append(f"stopping {guest.name} {failed}")

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"seen: {seen}")
"""


def test_hooks_see_each_guest_and_whether_its_test_failed(suite):
    with (suite.path / "conftest.py").open("a") as file:
        file.write(SEES_HOOKS)
    suite.write("def test_a(vm): pass\ndef test_b(vm): assert False")
    result = suite.run()
    result.assert_outcomes(passed=1, failed=1)
    seen = ["ready alpha-1-1", "stopping alpha-1-1 False"]
    seen += ["ready alpha-1-2", "stopping alpha-1-2 True"]
    assert f"seen: {seen}" in result.outlines


@pytest.mark.parametrize("isolation", ["module", "session"])
@pytest.mark.parametrize(
    ("tests", "failed"),
    [
        ("def test_a(vm): assert False\ndef test_b(vm): pass", True),
        ("def test_a(vm): pass\ndef test_b(): assert False", False),
        ("def test_a(vm): pass\n@pytest.mark.vm(cpus=2)\ndef test_b(vm): assert False", False),
    ],
    ids=["of it", "of none", "of another"],
)
def test_hooks_see_whether_any_test_of_a_guest_failed(suite, isolation, tests, failed):
    with (suite.path / "conftest.py").open("a") as file:
        file.write(SEES_HOOKS)
    suite.write(f"import pytest\npytestmark = pytest.mark.vm(isolation={isolation!r})\n{tests}")
    (line,) = (line for line in suite.run().outlines if line.startswith("seen: "))
    assert f"'stopping alpha-1-1 {failed}'" in line


class TestUnittest:
    """unittest's classes cannot be parametrized: their guest is of the first image."""

    USE = """
        import unittest
        import pytest

        {marked}
        @pytest.mark.usefixtures("vm")
        class TestOld(unittest.TestCase):
            def test_a(self): assert {passes}
    """

    def test_by_usefixtures(self, suite):
        suite.write(self.USE.format(marked="@pytest.mark.vm(cpus=2)", passes=True))
        suite.run("--vm=alpha-*").assert_outcomes(passed=1)
        assert suite.guests == ["boot alpha-1-1 cpus=2", "end alpha-1-1"]

    def test_by_an_autouse_fixture(self, suite):
        suite.write("""
            import unittest
            import pytest

            class TestOld(unittest.TestCase):
                @pytest.fixture(autouse=True)
                def _guest(self, vm):
                    self.vm = vm

                def test_a(self): self.assertEqual(self.vm.name, "alpha-1-1")
                def test_b(self): self.assertEqual(self.vm.name, "alpha-1-2")
        """)
        suite.run().assert_outcomes(passed=2)

    def test_none_applies(self, suite):
        suite.write(self.USE.format(marked="@pytest.mark.vm('beta')", passes=True))
        suite.run("--vm=alpha-1").assert_outcomes(deselected=1)
        assert suite.guests == []

    def test_skip(self, suite):
        marked = "@pytest.mark.vm(skip={'alpha-1': 'no nftables'})"
        suite.write(self.USE.format(marked=marked, passes=True))
        result = suite.run("-rs")
        result.assert_outcomes(skipped=1)
        assert "no nftables" in result.stdout.str()
        assert suite.guests == []

    def test_xfail(self, suite):
        marked = "@pytest.mark.vm(xfail={'alpha-1': 'known'})"
        suite.write(self.USE.format(marked=marked, passes=False))
        suite.run().assert_outcomes(xfailed=1)

    def test_a_bad_marker_is_a_usage_error(self, suite):
        suite.write(self.USE.format(marked="@pytest.mark.vm(cpus=0)", passes=True))
        assert "test_suite.py::TestOld::test_a: cpus=0" in suite.usage_error()


@pytest.mark.parametrize("plugin", [it for it in default_plugins if it not in essential_plugins])
def test_a_plugin_of_pytests_is_off(suite, plugin):
    """Tests that drive a guest need none of them."""
    suite.write("""
import pytest

def test_passes(vm, vm_artifacts):
    assert vm.alive
    assert vm_artifacts.exists()

@pytest.mark.vm("beta", cpus=13)
def test_has_no_guest(vm): pass
""")
    result = suite.run("-p", f"no:{plugin}")
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    if plugin == "python":
        assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    else:
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        assert suite.guests == ["boot alpha-1-1", "end alpha-1-1", "boot beta-2 cpus=13"]
