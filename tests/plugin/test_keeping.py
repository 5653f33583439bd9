"""Which guests `--vm-keep` keeps, at which moment, and what is said about them. A fake keeps them."""

import pytest


@pytest.fixture
def kept(suite):
    """Runs a file, and returns what happens to its guests."""

    def run(source, *args, keep="failed", **outcomes):
        return suite.check(source, f"--vm-keep={keep}", *args, **outcomes)

    return run


class TestTheMoment:
    """The guest still runs, and nothing has been torn down."""

    def test_a_call_that_fails(self, kept):
        assert kept("def test_a(vm): assert vm is None, 'why'", failed=1) == [
            "boot alpha-1-1",
            "keep alpha-1-1 1 call AssertionError: why",
            "end alpha-1-1",
        ]

    def test_an_error_that_fails_itself(self, kept):
        source = """
            class Evil(Exception):
                def __str__(self): raise KeyError
                __repr__ = __eq__ = __str__
                __len__ = lambda self: 0
            def test_a(vm, vm_factory):
                with vm_factory.boot("alpha-1"):
                    raise Evil
        """
        happened = kept(source, "--vm-artifacts=kept", failed=1)
        assert [line for line in happened if line.startswith("keep")] == [
            "keep alpha-1-1 1 call Evil",
            "keep alpha-1-2 2 call Evil",
        ]

    def test_a_setup_that_fails(self, kept):
        source = """
            import pytest
            @pytest.fixture
            def app(vm): raise ValueError("no app")
            def test_a(app): pass
        """
        assert kept(source, errors=1)[1:] == [
            "keep alpha-1-1 1 setup ValueError: no app",
            "end alpha-1-1",
        ]

    @pytest.mark.parametrize(
        "teardown",
        [
            "yield vm; assert not vm.alive, 'left'",
            "request.addfinalizer(lambda: pytest.fail('left')); yield",
            "request.getfixturevalue('vm'); yield; raise AssertionError('left')",
        ],
        ids=["yield", "finalizer", "dynamic"],
    )
    def test_a_teardown_that_fails_while_the_guest_lives(self, kept, teardown):
        source = f"""
            import pytest
            @pytest.fixture
            def app(request, vm): {teardown}
            def test_a(app): pass
        """
        if "getfixturevalue" in teardown:
            source = source.replace("app(request, vm)", "app(request)")
        _, keep, _ = kept(source, passed=1, errors=1)
        assert keep.startswith("keep alpha-1-1 1 teardown")
        assert keep.endswith("left")

    def test_the_call_s_failure_comes_before_the_teardown_s(self, kept):
        source = """
            import pytest
            @pytest.fixture
            def app(vm):
                yield
                assert False, "left"
            def test_a(app): assert False, "why"
        """
        assert kept(source, failed=1, errors=1)[1:] == [
            "keep alpha-1-1 1 call AssertionError: why",
            "end alpha-1-1",
        ]

    def test_a_unittest_s_failure_comes_before_its_teardown(self, suite):
        source = """
            import unittest
            import pytest

            class TestIt(unittest.TestCase):
                @pytest.fixture(autouse=True)
                def guest(self, vm): self.vm = vm
                def tearDown(self): self.vm.alive = "torn down"
                def test_a(self): self.fail(f"alive={self.vm.alive}")
                def test_b(self):
                    for number in range(3):
                        with self.subTest(number=number):
                            self.assertEqual(number, 0)
                @unittest.expectedFailure
                def test_c(self): self.fail()
        """
        suite.write(source)
        suite.run("--vm-keep=failed")  # how subtests are counted depends on pytest
        happened = suite.guests
        assert [line for line in happened if line.startswith("keep")] == [
            "keep alpha-1-1 1 call AssertionError: alive=True",
            "keep alpha-1-2 1 call AssertionError: 1 != 0",
        ]

    def test_the_first_subtest_that_fails_counts(self, kept):
        if not hasattr(pytest, "Subtests"):  # pytest 8 has them in a plugin of its own
            return
        source = """
            def test_a(vm, subtests):
                for number in range(3):
                    with subtests.test():
                        assert number == 0, number
        """
        _, keep, _ = kept(source, failed=3)
        assert keep == "keep alpha-1-1 1 call AssertionError: 1"

    @pytest.mark.parametrize("error", ["assert False, 'why'", "pytest.fail('why')"])
    def test_a_guest_of_a_block_in_the_test(self, kept, error):
        source = f"""
            import pytest

            def pytest_vmsandbox_guest_stopping(config, guest, failed):
                config.stash["x"] = 1

            def test_a(vm_factory):
                with vm_factory.boot("alpha-1") as a, vm_factory.boot("alpha-2") as b:
                    {error}
        """
        happened = kept(source, failed=1)
        assert [line.rpartition(" ")[0] for line in happened[2:4]] == [
            f"keep alpha-1-1 1 call {'Failed' if 'fail' in error else 'AssertionError'}:",
            f"keep alpha-2-2 2 call {'Failed' if 'fail' in error else 'AssertionError'}:",
        ]
        assert happened[4:] == ["end alpha-2-2", "end alpha-1-1"]

    def test_a_snapshot_that_is_about_to_be_restored(self, kept):
        source = """
            import pytest

            from pytest_vmsandbox.plugin import RUN

            def left(config, guest, error):  # what `Guest.snapshot` does at its end
                guest.alive = "in the block"
                config.stash[RUN].guest_restoring(guest.name, error)
                guest.alive = True

            def test_a(vm, pytestconfig):
                with pytest.raises(ZeroDivisionError):
                    try:
                        1 / 0
                    except ZeroDivisionError as error:
                        left(pytestconfig, vm, error)
                        raise
                try:
                    assert False, "why"
                except AssertionError as error:
                    left(pytestconfig, vm, error)
                    raise
        """
        assert kept(source, "--vm-artifacts=kept", failed=1)[1:] == [
            "keep alpha-1-1 1 call ZeroDivisionError: division by zero in the block",
            "keep alpha-1-1 1 call AssertionError: why in the block",
            "end alpha-1-1",
        ]

    def test_a_hook_that_refuses_the_guest(self, kept, suite):
        conftest = suite.path / "conftest.py"
        more = "\ndef pytest_vmsandbox_guest_ready(guest): assert guest is None, 'not ready'\n"
        conftest.write_text(conftest.read_text() + more)
        assert kept("def test_a(vm): pass", errors=1)[1:] == [
            "keep alpha-1-1 1 setup AssertionError: not ready"
        ]


class TestWhichOnesStay:
    def test_none_of_a_test_that_expects_the_exception(self, kept):
        source = """
            import pytest

            def test_a(vm_factory):
                with pytest.raises(ZeroDivisionError), vm_factory.boot("alpha-1") as a:
                    1 / 0
        """
        assert kept(source, passed=1)[1:] == [
            "keep alpha-1-1 1 call ZeroDivisionError: division by zero",
            "end alpha-1-1",
            "forget test_a#1",
        ]

    def test_the_failure_counts_and_not_what_was_expected_before(self, kept):
        source = """
            import pytest

            def test_a(vm, vm_factory):
                with pytest.raises(ZeroDivisionError), vm_factory.boot("alpha-1") as a:
                    1 / 0
                assert False, "why"
        """
        assert kept(source, failed=1)[2:] == [
            "keep alpha-1-1 1 call ZeroDivisionError: division by zero",
            "keep alpha-1-2 2 call ZeroDivisionError: division by zero",
            "end alpha-1-2",
            "keep alpha-1-1 1 call AssertionError: why",
            "end alpha-1-1",
        ]

    def test_an_error_that_comes_from_another_one_is_the_same_failure(self, kept):
        source = """
            def test_a(vm, vm_factory):
                try:
                    with vm_factory.boot("alpha-1"): 1 / 0
                except ArithmeticError as error:
                    raise ExceptionGroup("several", [ValueError("x"), error])
        """
        assert [line for line in kept(source, failed=1) if line.startswith("keep")] == [
            "keep alpha-1-1 1 call ZeroDivisionError: division by zero",
            "keep alpha-1-2 2 call ZeroDivisionError: division by zero",
        ]

    def test_an_expected_failure_is_none_and_a_strict_pass_is_one(self, kept):
        source = """
            import pytest

            @pytest.mark.xfail
            def test_a(vm): assert False
            @pytest.mark.xfail(strict=True, reason="old")
            def test_b(vm): pass
            def test_c(vm_factory):
                with vm_factory.boot("alpha-1"): pytest.skip("x")
        """
        happened = kept(source, failed=1, xfailed=1, skipped=1)
        assert [line for line in happened if line.startswith("keep")] == [
            "keep alpha-1-2 1 call [XPASS(strict)] old"
        ]

    @pytest.mark.parametrize("isolation", ["module", "session"])
    def test_a_guest_that_tests_share_is_kept_for_each(self, kept, isolation):
        source = f"""
            import pytest
            pytestmark = pytest.mark.vm(isolation="{isolation}")

            @pytest.fixture(scope="module")
            def app(vm_factory):
                yield
                assert False, "app"
            def test_a(vm): assert False, "a"
            def test_b(vm): assert False, "b"
            def test_c(): pass
            def test_d(app): pass
        """
        assert kept(source, failed=2, passed=2, errors=1) == [
            "boot alpha-1-1",
            "keep alpha-1-1 1 call AssertionError: a",
            "keep alpha-1-1 1 call AssertionError: b",
            "keep alpha-1-1 1 teardown AssertionError: app",
            "end alpha-1-1",
        ]

    def test_a_guest_of_a_fixture_that_only_an_earlier_test_used(self, kept):
        source = """
            import pytest

            @pytest.fixture(scope="module")
            def app(vm_factory):
                with vm_factory.boot("beta") as guest:
                    yield guest
                    assert False, "app"
            def test_a(app): pass
            def test_b(): pass
        """
        assert kept(source, passed=2, errors=1) == [
            "boot beta-1",
            "keep beta-1 1 teardown AssertionError: app",
            "end beta-1",
        ]

    @pytest.mark.parametrize("last", [0, 1])
    def test_the_last_attempt_counts(self, kept, last):
        source = f"""
            count = 0

            def test_a(vm, vm_factory):
                global count
                count += 1
                with vm_factory.boot("alpha-2"):
                    assert count == 3 * {last}, count
        """
        rerun = ("-p", "pytest_rerunfailures", "--reruns=2")
        happened = kept(source, *rerun, **({"passed": 1} if last else {"failed": 1}))
        keeps = [
            f"keep {guest} {number} call AssertionError: {attempt}"
            for attempt in range(1, 4 - last)
            for number, guest in enumerate(
                (f"alpha-1-{2 * attempt - 1}", f"alpha-2-{2 * attempt}"), 1
            )
        ]
        assert [line for line in happened if line.startswith("keep")] == keeps
        forgotten = ["forget test_a[alpha-1]#1", "forget test_a[alpha-1]#2"] if last else []
        assert sorted(line for line in happened if line.startswith("forget")) == forgotten

    def test_the_last_attempt_counts_when_a_plugin_repeats_the_call_before_its_report(
        self, kept, suite
    ):
        """As pytest-retry does."""
        conftest = suite.path / "conftest.py"
        conftest.write_text(
            conftest.read_text()
            + """
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        nextitem = pytest.Class.from_parent(item.session, name="Nothing")
        item.ihook.pytest_runtest_teardown(item=item, nextitem=nextitem)
        item._initrequest()
        item.ihook.pytest_runtest_setup(item=item)
        run = lambda: item.ihook.pytest_runtest_call(item=item)
        again = pytest.TestReport.from_item_and_call(item, pytest.CallInfo.from_call(run, when="call"))
        report.outcome, report.longrepr = again.outcome, again.longrepr
    return report
"""
        )
        source = """
            count = 0

            def test_a(vm, vm_factory):
                global count
                count += 1
                with vm_factory.boot("alpha-2"):
                    assert False, count
        """
        happened = kept(source, failed=1)
        assert [line for line in happened if line.startswith("keep")] == [
            "keep alpha-1-1 1 call AssertionError: 1",
            "keep alpha-2-2 2 call AssertionError: 1",
            "keep alpha-1-3 1 call AssertionError: 2",
            "keep alpha-2-4 2 call AssertionError: 2",
        ]

    def test_all_has_no_failed_attempt_of_a_test_that_passes(self, kept, suite):
        """A plugin repeats the test without pytest's hooks."""
        source = """
            import pytest

            from pytest_vmsandbox.plugin import RUN

            def test_a(vm, request, pytestconfig):
                pytestconfig.stash[RUN].at_failure(request.node, "call", "first attempt")
            def test_b(vm_factory, request, pytestconfig):
                with vm_factory.boot("alpha-1"):
                    pytestconfig.stash[RUN].at_failure(request.node, "call", "first attempt")
        """
        happened = kept(source, keep="all", passed=2)
        assert [line for line in happened if not line.startswith(("boot", "end"))] == [
            "keep alpha-1-1 1 call first attempt",
            "keep alpha-1-1 1 call passed",
            "keep alpha-1-2 1 call first attempt",
            "forget test_b#1",
        ]
        (line,) = [line for line in suite.result.outlines if "vmsandbox enter" in line]
        assert line.startswith("passed, 3MiB: ")

    def test_all(self, kept):
        source = """
            import pytest

            @pytest.fixture
            def app(vm):
                yield vm
                vm.alive = False
            def test_a(app): assert app.alive
            def test_b(vm_factory):
                with vm_factory.boot("alpha-2"): pass
            @pytest.fixture
            def left(vm):
                yield
                assert False, "left"
            def test_c(left): pass
        """
        happened = kept(source, keep="all", passed=3, errors=1)
        assert [line for line in happened if line.startswith(("keep", "forget"))] == [
            "keep alpha-1-1 1 call passed",
            "keep alpha-2-2 1 call passed",
            "keep alpha-1-3 1 call passed",
            "keep alpha-1-3 1 teardown AssertionError: left",
        ]


class TestTimeouts:
    """Those of pytest-timeout, by its alarm."""

    OPTIONS = ("-p", "pytest_timeout", "--timeout=0.5", "--timeout-method=signal")

    @pytest.mark.parametrize("block", ["with vm_factory.boot('alpha-1'): sleep(9)", "sleep(9)"])
    def test_a_test_that_takes_too_long_has_failed(self, kept, block):
        source = f"""
            from time import sleep

            def test_a(vm, vm_factory):
                {block}
        """
        keeps = [line for line in kept(source, *self.OPTIONS, failed=1) if line.startswith("keep")]
        assert keeps[0].startswith("keep alpha-1-1 1 call Failed: Timeout")
        assert len(keeps) == (2 if "boot" in block else 1)

    def test_saving_does_not_count(self, kept):
        source = """
            from time import sleep

            from pytest_vmsandbox.plugin import RUN

            def test_a(vm, pytestconfig):
                keeper = pytestconfig.stash[RUN].keeping.keeper
                keep = keeper.keep
                keeper.keep = lambda guest, moment: (sleep(0.6), keep(guest, moment))[1]
                assert False, "why"
        """
        assert kept(source, *self.OPTIONS, failed=1)[1:] == [
            "keep alpha-1-1 1 call AssertionError: why",
            "end alpha-1-1",
        ]

    SLOW = """
        from time import sleep

        import pytest

        from pytest_vmsandbox.plugin import RUN

        @pytest.fixture(autouse=True)
        def slow(pytestconfig):
            pytestconfig.stash[RUN]._gatherer._ask = lambda guest: sleep(0.6) or {}
    """

    @pytest.mark.parametrize("method", ["signal", "thread"])
    def test_looking_at_a_guest_does_not_count(self, suite, method):
        suite.write(
            self.SLOW
            + """
        def test_a(vm):
            assert 0, "why"

        def test_b(vm, vm_factory):
            with pytest.raises(ZeroDivisionError), vm_factory.boot("alpha-1"):
                1 / 0
        """
        )
        result = suite.run_apart("--timeout=0.5", f"--timeout-method={method}")
        result.assert_outcomes(failed=1, passed=1)
        assert "INTERNALERROR" not in result.stdout.str()

    def test_pytests_own_limit_does_not_end_the_run_then(self, suite):
        suite.write(self.SLOW + "\n        def test_a(vm): assert 0")
        ends = "-ofaulthandler_timeout=0.5", "-ofaulthandler_exit_on_timeout=true"
        suite.run_apart(*ends).assert_outcomes(failed=1)

    @pytest.mark.parametrize("method", ["signal", "thread"])
    def test_the_rest_of_the_test_has_the_rest_of_its_time(self, suite, method):
        suite.write(
            self.SLOW
            + """
        def test_b(vm, vm_factory):
            with pytest.raises(ZeroDivisionError), vm_factory.boot("alpha-1"):
                1 / 0
            sleep(9)
        """
        )
        result = suite.run_apart("--timeout=0.5", f"--timeout-method={method}")
        if method == "signal":
            result.assert_outcomes(failed=1)
        else:  # it ends the whole run
            assert result.ret == 1
        assert "Timeout" in result.stdout.str()


class TestInterrupts:
    def test_what_is_kept_is_shown(self, suite):
        suite.write("""
            import os, signal

            def test_a(vm): assert False
            def test_b(vm): os.kill(os.getpid(), signal.SIGINT)
        """)
        result = suite.run_apart("--vm-keep=failed")
        assert result.ret == pytest.ExitCode.INTERRUPTED
        shown = [line for line in result.outlines if line.startswith("failed in call")]
        assert shown == ["failed in call, 3MiB: vmsandbox enter 'test_suite.py::test_a[alpha-1]'"]
        assert [line for line in suite.guests if line.startswith(("keep", "forget"))] == [
            "keep alpha-1-1 1 call assert False"
        ]

    def test_a_guest_that_was_being_saved_is_shown(self, suite):
        """It was saved in a thread."""
        suite.write("""
            from pytest_vmsandbox.plugin import RUN

            def test_a(vm, pytestconfig):
                pytestconfig.stash[RUN].keeping.keeper.interrupted = True
                assert False
        """)
        result = suite.run_apart("--vm-keep=failed")
        assert result.ret == pytest.ExitCode.INTERRUPTED
        assert suite.guests[2:] == ["end alpha-1-1"]
        shown = [line for line in result.outlines if line.startswith("failed in call")]
        assert shown == ["failed in call, 3MiB: vmsandbox enter 'test_suite.py::test_a[alpha-1]'"]


class TestWhatIsSaid:
    def test_the_summary_has_a_line_for_each_guest(self, kept, suite):
        source = """
            import pytest

            @pytest.mark.parametrize("x", ["it's"])
            def test_a(vm, x): assert False
            def test_b(vm, vm_factory):
                with vm_factory.boot("alpha-2"): assert False
            def test_c(vm): pass
        """
        kept(source, "-q", failed=2, passed=1)
        lines = suite.result.outlines
        at = next(number for number, line in enumerate(lines) if "= kept guests" in line)
        assert "kept guests (9MiB; all there are: 1GiB of 8GiB)" in lines[at]
        enter = "3MiB: vmsandbox enter 'test_suite.py::test_"
        before, several = f"failed in call, {enter}", f"failed in call, its guest {{}}, {enter}"
        assert lines[at + 1 : at + 4] == [
            f"""{before}a[alpha-1-it'"'"'s]'""",
            f"{several.format(1)}b[alpha-1]' --guest alpha-1-2",
            f"{several.format(2)}b[alpha-1]' --guest alpha-2-3",
        ]
        suite.result.stdout.fnmatch_lines(
            ["enter: vmsandbox enter 'test_suite.py::test_b?alpha-1?' --guest alpha-2-3"]
        )

    def test_guests_on_a_network_wake_together(self, kept, suite):
        source = """
            def test_a(vm): assert False
            def test_on_a_network(vm): assert False
        """
        said = "guests on common networks wake together: *"
        kept(source, "-k", "test_a", failed=1, deselected=1)
        suite.result.stdout.no_fnmatch_line(said)
        kept(source, failed=2)
        suite.result.stdout.fnmatch_lines(["failed in call, * vmsandbox enter *", said])

    def test_so_it_is_with_xdist_even_if_a_worker_crashes(self, suite):
        suite.write("""
            import os

            def test_a(vm): assert False
            def test_b(vm): os._exit(1)
            def test_c(vm): assert False
            def test_removed(vm): assert False
        """)
        result = suite.run_apart("-n1", "--vm-keep=failed")
        lines = [line for line in result.outlines if line.startswith("failed in call")]
        before = "failed in call, 3MiB: vmsandbox enter 'test_suite.py::test"
        assert lines == [f"{before}_a[alpha-1]'", f"{before}_c[alpha-1]'"]

    @pytest.mark.parametrize("args", [["--collect-only"], ["-p", "no:terminal"], []])
    def test_nothing_without_a_failure_of_a_guest(self, suite, args):
        suite.write(
            "def test_a(vm): pass\ndef test_b(): assert False"
            if not args
            else "def test_a(vm): assert False"
        )
        result = suite.run("--vm-keep=failed", *args)
        assert "kept" not in result.stdout.str()
        assert "--vm-keep" not in result.stdout.str()

    @pytest.mark.parametrize("args", [[], ["--vm-keep=none"], ["-ovm_keep=none"]])
    def test_without_the_option_it_is_mentioned_once(self, suite, args):
        suite.write("""
            def test_a(vm): assert False
            def test_b(vm_factory):
                with vm_factory.boot("alpha-1"): assert False
            def test_c(): assert False
        """)
        text = suite.run(*args).stdout.str()
        assert text.count("vmsandbox: --vm-keep=failed keeps") == (0 if args else 1)

    def test_junit_has_the_command(self, kept, suite):
        source = """
            def test_a(vm): assert False
            def test_b(vm): pass
        """
        kept(source, "--junitxml=junit.xml", failed=1, passed=1)
        _, *properties = (suite.path / "junit.xml").read_text().split("<property ")
        enter = [line for line in properties if line.startswith('name="vm_enter"')]
        assert [line.partition(" />")[0] for line in enter] == [
            '''name="vm_enter" value="vmsandbox enter 'test_suite.py::test_a[alpha-1]'"'''
        ]

    def test_a_guest_that_cannot_be_kept_is_no_further_failure(self, kept, suite):
        source = """
            from pytest_vmsandbox.core.errors import CacheError
            from pytest_vmsandbox.plugin import RUN

            def fail(pytestconfig, error):
                pytestconfig.stash[RUN].keeping.keeper.fails = error
                assert False
            def test_a(vm, pytestconfig):
                fail(pytestconfig, CacheError("alpha-1-1 could not be kept", details="disk\\nfull"))
            def test_b(vm, pytestconfig): fail(pytestconfig, KeyError("x"))
            def test_c(vm, pytestconfig): fail(pytestconfig, KeyError("x"))
            def test_d(vm, pytestconfig):
                run = pytestconfig.stash[RUN].keeping._removed.append("the kept guest x was removed")
        """
        kept(source, failed=3, passed=1)
        shown = suite.result.outlines
        assert "alpha-1-1 could not be kept: disk" in shown
        assert "alpha-1-2 could not be kept: KeyError('x')" in shown
        assert [line for line in shown if line.startswith("vmsandbox: the ")] == [
            "vmsandbox: the guest of test_suite.py::test_a[alpha-1] could not be kept: disk",
            "vmsandbox: the guest of test_suite.py::test_b[alpha-1] and 1 more could not be kept: KeyError('x')",
            "vmsandbox: the kept guest x was removed",
        ]
        assert "kept guests" not in suite.result.stdout.str()

    def test_a_guest_that_cannot_be_kept_counts_once(self, kept, suite):
        source = """
            import pytest

            from pytest_vmsandbox.core.errors import CacheError
            from pytest_vmsandbox.plugin import RUN

            @pytest.fixture
            def app(vm, pytestconfig):
                yield
                error = CacheError("x is in use", remedy="end it")
                pytestconfig.stash[RUN].keeping.keeper.fails = error
                assert False
            def test_a(app): pass
        """
        kept(source, passed=1, errors=1)
        assert [line for line in suite.result.outlines if line.startswith("vmsandbox: the ")] == [
            "vmsandbox: the guest of test_suite.py::test_a[alpha-1] could not be kept: x is in use (end it)"
        ]

    def test_guests_that_are_removed_for_lack_of_room_take_one_line(self, kept, suite):
        source = """
            from pytest_vmsandbox.plugin import RUN

            def test_a(pytestconfig):
                removed = pytestconfig.stash[RUN].keeping._removed
                removed += [f"the kept guest {it} of {it} was removed: no room" for it in "ab"]
        """
        kept(source, "-ovm_keep_size=1MiB", passed=1)
        (line,) = [line for line in suite.result.outlines if "were removed" in line]
        assert line.startswith(
            "vmsandbox: 2 kept guests were removed, the oldest first, because vm_"
        )
        assert line.endswith("is 1MiB. The last one was the kept guest b of b")
