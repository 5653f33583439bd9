"""What becomes of faults when a test fails, and at its end. The guests and the faults are fakes."""

import re

import pytest

WHEN = r"\d{4}-\d\d-\d\d [\d:.]{12}Z"
FAULT = re.compile(rf"(fault in \S+: .*?) \(began {WHEN}, (still in force|ended {WHEN})\)(.*)")


@pytest.fixture
def shown(suite):
    """Runs a file. Returns what is shown of faults, and what happened to guests without their ends."""

    def run(source, *args, **outcomes):
        guests = suite.check(source, *args, **outcomes)
        found = map(FAULT.fullmatch, suite.result.outlines)
        lines = [f"{it[1]} {it[2].split()[0]}{it[3]}" for it in found if it]
        return lines, [line for line in guests if not line.startswith(("boot", "end"))]

    return run


def told(suite):
    """The lines at the end of the run."""
    return [line for line in suite.result.outlines if line.startswith("vmsandbox: test_")]


class TestInForce:
    """A fault that is in force when a test fails."""

    def test_in_the_call(self, shown, suite):
        source = """
            def test_a(vm):
                vm.fault("slow")
                vm.fault("deaf")
                assert 0
        """
        assert shown(source, "--vm-keep=failed", failed=1) == (
            ["fault in alpha-1-1: slow ended", "fault in alpha-1-1: deaf ended"],
            # The last one first, and before the guest is kept.
            ["restore alpha-1-1 deaf", "restore alpha-1-1 slow", "keep alpha-1-1 1 call assert 0"],
        )
        section = suite.result.stdout.str().partition("- vmsandbox -")[2]
        assert "fault in alpha-1-1: slow" in section
        assert told(suite) == []

    def test_in_a_block(self, shown):
        """The block ends it before anybody sees the failure."""
        source = """
            def test_a(vm):
                with vm.fault("over"):
                    pass
                with vm.fault("outer"), vm.fault("inner"):
                    assert 0
        """
        assert shown(source, failed=1) == (
            ["fault in alpha-1-1: outer ended", "fault in alpha-1-1: inner ended"],
            [f"restore alpha-1-1 {text}" for text in ("over", "inner", "outer")],
        )

    def test_in_the_setup_and_in_the_teardown(self, shown, suite):
        source = """
            import pytest

            @pytest.fixture
            def begins(vm):
                vm.fault("early")
                assert 0

            @pytest.fixture
            def ends(vm):
                yield
                vm.fault("late")
                assert 0

            @pytest.fixture
            def block(vm):
                yield
                with vm.fault("block"):
                    assert 0

            def test_a(begins): pass
            def test_b(ends): pass
            def test_c(block): pass
        """
        assert shown(source, passed=2, errors=3)[0] == [
            "fault in alpha-1-1: early ended",
            "fault in alpha-1-2: late still",  # until the guest's end, before the failure is known
            "fault in alpha-1-3: block ended",
        ]

    def test_of_a_fixture(self, shown):
        """It is ended before the guest is looked at, not only in the teardown."""
        source = """
            import pytest

            @pytest.fixture
            def slow(vm):
                with vm.fault("slow"):
                    yield

            def test_a(vm, slow): assert 0
            def test_b(vm, slow): pass
        """
        assert shown(source, "--vm-keep=failed", failed=1, passed=1) == (
            ["fault in alpha-1-1: slow ended"],
            ["restore alpha-1-1 slow", "keep alpha-1-1 1 call assert 0", "restore alpha-1-2 slow"],
        )

    def test_in_a_guest_that_is_gone_when_the_failure_is_seen(self, shown):
        source = """
            def test_a(vm_factory):
                with vm_factory.boot("alpha-1") as one, vm_factory.boot("alpha-2") as two:
                    one.fault("left")
                    with two.fault("block"):
                        assert 0
        """
        lines, happened = shown(source, "--vm-keep=failed", failed=1)
        assert lines == ["fault in alpha-2-2: block ended", "fault in alpha-1-1: left ended"]
        assert [line.partition(" call")[0] for line in happened] == [
            "restore alpha-2-2 block",
            "keep alpha-1-1 1",
            "keep alpha-2-2 2",
            "restore alpha-1-1 left",
        ]

    def test_that_cannot_be_ended(self, shown):
        source = """
            def test_a(vm):
                with vm.fault("first stays"):
                    vm.fault("second stays")
                    assert 0, "why"
        """
        lines, _ = shown(source, failed=1)
        assert lines == [
            "fault in alpha-1-1: first stays ended",
            "fault in alpha-1-1: second stays ended. It could not be ended: QEMU refuses: second stays",
        ]

    @pytest.mark.parametrize(
        "end", ["raise ValueError", "assert 0", "vm.fault('more'); raise KeyError"]
    )
    def test_that_the_test_expects_to_fail_is_not_shown(self, shown, suite, end):
        source = f"""
            import pytest

            def test_a(vm, vm_factory):
                with pytest.raises(BaseException), vm.fault("expected"):
                    {end}
                with pytest.raises(BaseException), vm_factory.boot("alpha-2") as vm:
                    vm.fault("gone")
                    {end}
                [fault.end() for fault in list(vm.machines.faults.in_force)]

            def test_b(vm): assert 0, "something else"
        """
        lines, _ = shown(source, passed=1, failed=1)
        assert lines == []
        assert told(suite) == []

    def test_that_a_snapshot_meets_stays_in_force(self, shown):
        """The test may expect the error, and go on."""
        source = """
            import pytest

            from pytest_vmsandbox.plugin import RUN

            def test_a(vm, pytestconfig):
                fault, frozen = vm.fault("slow"), vm.fault("frozen")
                frozen.freezes = True
                pytestconfig.stash[RUN].guest_restoring(vm.name, ValueError())
                assert fault.in_force
                assert not frozen.in_force  # or nobody could look at the guest
        """
        assert shown(source, "--vm-keep=failed", passed=1)[0] == []

    def test_in_each_attempt(self, shown, suite):
        source = """
            count = 0

            def test_a(vm):
                global count
                count += 1
                vm.fault(f"{count}")
                assert count == 3
        """
        lines, _ = shown(source, "-p", "pytest_rerunfailures", "--reruns=2", "-rR", passed=1)
        assert lines == []
        assert (
            suite.guests.count("restore alpha-1-1 1")
            == suite.guests.count("restore alpha-1-2 2")
            == 1
        )

    def test_with_xdist(self, shown):
        lines, _ = shown("def test_a(vm): assert not vm.fault('slow')", "-n1", apart=True, failed=1)
        assert lines == ["fault in alpha-1-1: slow ended"]

    def test_of_a_unittest(self, shown):
        source = """
            import unittest
            import pytest

            class TestIt(unittest.TestCase):
                @pytest.fixture(autouse=True)
                def guest(self, vm): self.vm = vm
                def test_a(self):
                    self.vm.fault("left")
                    with self.vm.fault("block"):
                        self.fail("why")
        """
        assert shown(source, failed=1)[0] == [
            "fault in alpha-1-1: left ended",
            "fault in alpha-1-1: block ended",
        ]

    def test_when_a_subtest_fails_stays_in_force_for_the_others(self, shown):
        if not hasattr(pytest, "Subtests"):  # pytest 8 has them in a plugin of its own
            return
        source = """
            def test_a(vm, subtests):
                with vm.fault("slow") as fault:
                    for number in range(3):
                        with subtests.test():
                            assert fault.in_force
                            assert number == 0, number
        """
        lines, _ = shown(source, failed=3)
        assert lines == ["fault in alpha-1-1: slow still"] * 2

    def test_is_ended_before_the_debugger(self, shown, suite):
        suite.write("""
            import pdb

            def interaction(self, *_): raise pdb.bdb.BdbQuit
            pdb.Pdb.interaction = interaction

            def test_a(vm):
                vm.fault("slow")
                assert 0
        """)
        result = suite.run_apart("--pdb")
        text = result.stdout.str()
        assert re.search(
            r"vmsandbox: fault in alpha-1-1: slow .*ended.*\n(.*\n)*.*entering PDB", text
        )


class TestSharedGuests:
    """A fault must not meet a test that did not begin it."""

    def test_what_a_test_leaves_is_ended(self, shown, suite):
        source = """
            import pytest

            @pytest.mark.vm(isolation="module")
            def test_a(vm): vm.fault("slow")
            @pytest.mark.vm(isolation="module")
            def test_b(vm): assert not vm.machines.faults.in_force
            @pytest.mark.vm(isolation="module")
            def test_c(vm): assert 0
            def test_d(vm): vm.fault("left in a guest of its own")
        """
        assert shown(source, passed=3, failed=1) == ([], ["restore alpha-1-1 slow"])
        assert told(suite) == [
            "vmsandbox: test_suite.py::test_a[alpha-1] left a fault in force in alpha-1-1, which was ended: slow"
        ]

    def test_what_cannot_be_ended_fails_the_run(self, shown, suite):
        source = """
            import pytest

            pytestmark = pytest.mark.vm(isolation="session")

            def test_a(vm): vm.fault("stays")
            def test_b(vm): pass
        """
        shown(source, passed=2)
        assert suite.result.ret == pytest.ExitCode.TESTS_FAILED
        (line,) = told(suite)
        assert line.startswith(
            "vmsandbox: test_suite.py::test_a[alpha-1] left a fault in force in alpha-1-1, "
        )
        assert line.endswith("which could not be ended: stays: QEMU refuses: stays")

    def test_what_is_left_of_one_that_is_over_fails_the_run(self, shown, suite):
        source = """
            import pytest

            from pytest_vmsandbox import ConfigError

            def answers(vm):
                def restore(): raise ConfigError("it is full", remedy="none")
                vm.machines.faults.owes(restore)
                vm.machines.faults.answered()

            @pytest.mark.vm(isolation="session")
            def test_a(vm): answers(vm)
            @pytest.mark.vm(isolation="session")
            def test_b(vm): pass
            def test_c(vm_factory):
                with vm_factory.boot("alpha-2") as vm: answers(vm)
        """
        shown(source, passed=3)
        assert suite.result.ret == pytest.ExitCode.TESTS_FAILED
        assert told(suite) == [
            f"vmsandbox: test_suite.py::test_{test}: {guest}: the guest could not be restored: it is full"
            for test, guest in (("a[alpha-1]", "alpha-1-1"), ("c", "alpha-2-2"))
        ]

    def test_of_a_fixture_of_a_wider_scope_stays(self, shown, suite):
        source = """
            import pytest

            @pytest.fixture(scope="module")
            def slow(vm_factory):
                with vm_factory.boot("alpha-1") as vm:
                    vm.fault("slow")
                    yield vm

            def test_a(slow):
                slow.fault("own")
                assert 0
            def test_b(slow): assert [str(it.text) for it in slow.machines.faults.in_force] == ["slow"]
            def test_c(slow): assert 0
        """
        lines, happened = shown(source, failed=2, passed=1)
        assert lines == [
            "fault in alpha-1-1: slow still",
            "fault in alpha-1-1: own ended",
            "fault in alpha-1-1: slow still",
        ]
        assert happened == [
            "restore alpha-1-1 own",
            "restore alpha-1-1 slow",
        ]  # the latter at its end
        assert told(suite) == []

    def test_of_a_fixture_that_failed_does_not(self, shown):
        source = """
            import pytest

            @pytest.fixture(scope="session")
            def guest(vm_factory):
                with vm_factory.boot("alpha-1") as vm: yield vm
            @pytest.fixture(scope="module")
            def slow(guest):
                guest.fault("slow")
                assert 0

            def test_a(slow): pass
            def test_b(guest): assert not guest.machines.faults.in_force
        """
        assert shown(source, errors=1, passed=1) == (
            ["fault in alpha-1-1: slow ended"],
            ["restore alpha-1-1 slow"],
        )

    def test_of_a_hook_stays(self, shown, suite):
        conftest = suite.path / "conftest.py"
        hook = "\ndef pytest_vmsandbox_guest_ready(guest): guest.fault('slow')\n"
        conftest.write_text(conftest.read_text() + hook)
        source = """
            import pytest
            pytestmark = pytest.mark.vm(isolation="module")

            def test_a(vm): pass
            def test_b(vm): assert 0
            def test_c(vm): assert vm.machines.faults.in_force
        """
        lines, happened = shown(source, passed=2, failed=1)
        assert lines == ["fault in alpha-1-1: slow still"]
        assert happened == []
        assert told(suite) == []


def test_a_guest_of_a_test_that_passes_is_kept_without_faults(shown):
    source = """
        import pytest

        @pytest.fixture
        def slow(vm):
            with vm.fault("slow"): yield
        def test_a(vm, slow): pass
        def test_b(vm_factory):
            with vm_factory.boot("alpha-1") as vm: vm.fault("left")
    """
    _, happened = shown(source, "--vm-keep=all", passed=2)
    assert happened == [
        "restore alpha-1-1 slow",
        "keep alpha-1-1 1 call passed",
        "restore alpha-1-2 left",
        "keep alpha-1-2 1 call passed",
    ]


def test_the_log_is_among_the_artifacts(shown, suite):
    shown("def test_a(vm): assert not vm.fault('slow')", "--vm-artifacts=kept", failed=1)
    (log,) = suite.path.glob("kept/*/alpha-1-1/faults.log")
    assert re.fullmatch(rf"{WHEN} begin slow\n{WHEN} end   slow\n", log.read_text())
    assert log.stat().st_mode & 0o077 == 0


def test_a_test_without_its_network_proves_nothing(suite):
    source = """
        from types import SimpleNamespace
        from pytest_vmsandbox import LaunchError

        def check():
            raise LaunchError("the switch is gone")

        def test_a(vm):
            vm.machines.cards.append(SimpleNamespace(check=check))
    """
    suite.check(source, errors=1)
    suite.result.stdout.fnmatch_lines(["*the switch is gone*"])
