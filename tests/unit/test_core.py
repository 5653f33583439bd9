"""Errors, sizes, hardware and time."""

import pickle

import pytest
from hypothesis import given, strategies as st

from pytest_vmsandbox.core import errors
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import (
    INFRASTRUCTURE,
    BootError,
    CommandError,
    CommandResult,
    CommandTimeout,
    ConfigError,
    GuestLost,
    MonitorError,
    VMSandboxError,
)
from pytest_vmsandbox.core.spec import (
    GIB,
    HARDWARE_NAMES,
    KIB,
    MIB,
    TIB,
    Hardware,
    format_size,
    parse_size,
)


def result(stdout="", stderr=""):
    return CommandResult(argv=("x",), returncode=1, stdout=stdout, stderr=stderr, duration=0.1)


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (VMSandboxError("brief"), "brief"),
            (VMSandboxError("brief", details="a\nb\n", remedy="do"), "brief\na\nb\nRemedy: do"),
            (errors.ImageError("brief"), "[image] brief"),
            (errors.LaunchError("brief"), "[launch] brief"),
            (errors.LaunchError("brief", stage="firmware"), "[firmware] brief"),
            (BootError("brief", stage="kernel", seconds=3), "[kernel] brief"),
            (GuestLost("brief"), "[command] brief"),
            (errors.TransferError("brief"), "[transfer] brief"),
            (errors.TeardownError("brief"), "[teardown] brief"),
            (CommandError("brief", result=result()), "[command] brief"),
            (
                CommandError("brief", result=result("out\n", "err\n"), remedy="do"),
                "[command] brief\n--- stdout\nout\n--- stderr\nerr\nRemedy: do",
            ),
            (
                CommandTimeout("brief", seconds=3, stdout=b"\xff\n"),
                "[command] brief\n--- stdout\n\ufffd",
            ),
            (MonitorError("brief", details="why"), "[command] brief\nwhy"),
        ],
    )
    def test_text_is_brief_then_details_then_remedy(self, error, text):
        assert str(error) == text

    def test_all_have_one_root(self):
        classes = [it for it in vars(errors).values() if isinstance(it, type)]
        found = [it for it in classes if issubclass(it, BaseException)]
        assert len(found) > 10
        assert all(issubclass(it, VMSandboxError) for it in found)

    def test_a_failed_command_is_no_failure_of_the_infrastructure(self):
        assert not issubclass(CommandError, INFRASTRUCTURE)
        assert not issubclass(CommandTimeout, INFRASTRUCTURE)
        assert issubclass(GuestLost, INFRASTRUCTURE)

    def test_a_long_stream_is_cut_in_the_text_alone(self):
        error = CommandError("brief", result=result("a" * 9_000 + "end"))
        assert "[1003 characters left out]" in str(error)
        assert str(error).endswith("aend")
        assert len(error.result.stdout) == 9_003

    def test_values_are_kept(self):
        assert BootError("brief", stage="init", seconds=2.5).seconds == 2.5
        assert MonitorError("brief", error_class="GenericError").error_class == "GenericError"
        assert CommandTimeout("brief", seconds=1, stderr=b"e").stderr == b"e"


class TestSizes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("1KiB", KIB),
            ("512MiB", 512 * MIB),
            ("1.5GiB", 3 * GIB // 2),
            (" 2 TiB ", 2 * TIB),
            ("0.5KiB", 512),
        ],
    )
    def test_read(self, text, size):
        assert parse_size(text, "memory") == size

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "12",
            12,
            None,
            "1GB",
            "1gib",
            "-1GiB",
            "0GiB",
            "0.0001KiB",
            "GiB",
            "1,5GiB",
            "nanGiB",
            "1e3KiB",
            "1GiB 2",
            "1\nGiB2",
            b"1GiB",
            True,
        ],
    )
    def test_refused(self, text):
        with pytest.raises(ConfigError, match="is not a size") as caught:
            parse_size(text, "memory")
        assert str(caught.value).startswith(f"memory={text!r}")
        assert "512MiB" in caught.value.remedy

    @given(st.text("0123456789.,-+e KMGTiB\n¹", max_size=12))
    def test_any_text_is_a_positive_size_or_refused(self, text):
        try:
            assert parse_size(text, "memory") > 0
        except ConfigError:
            pass

    @given(st.integers(1, 4096), st.sampled_from(["KiB", "MiB", "GiB", "TiB"]))
    def test_what_is_written_is_read_as_nearly_the_same(self, number, unit):
        size = parse_size(f"{number}{unit}", "disk")
        assert abs(parse_size(format_size(size), "disk") - size) <= size * 0.05

    @pytest.mark.parametrize(
        ("size", "text"),
        [(0, "0B"), (1023, "1023B"), (KIB, "1KiB"), (MIB - 1, "1024KiB"), (1536 * MIB, "1.5GiB")],
    )
    def test_written(self, size, text):
        assert format_size(size) == text


class TestHardware:
    def test_defaults(self):
        assert Hardware() == Hardware(
            cpus=1, memory=512 * MIB, disk=None, disks=(), network="isolated", user=""
        )

    @pytest.mark.parametrize(
        ("name", "wish", "value"),
        [
            ("cpus", 2, 2),
            ("cpus", "4", 4),
            ("cpus", 255, 255),
            ("memory", "1GiB", GIB),
            ("disk", "16GiB", 16 * GIB),
            ("disks", ["1GiB", "2MiB"], (GIB, 2 * MIB)),
            ("disks", (), ()),
            ("disks", ["1MiB"] * 8, (MIB,) * 8),
            ("network", "nat", "nat"),
            ("user", "a_b-c.d", "a_b-c.d"),
            ("user", None, ""),
        ],
    )
    def test_takes(self, name, wish, value):
        assert getattr(Hardware().changed({name: wish}), name) == value

    @pytest.mark.parametrize(
        ("name", "wish"),
        [
            *(("cpus", wish) for wish in (0, 256, -1, 1.5, True, "two", "", "¹", [1])),
            *(("memory", wish) for wish in (512, "512", "0MiB")),
            *(("disk", wish) for wish in (0, "big")),
            *(("disks", wish) for wish in ("1GiB", 3, ["1GiB", 2], ["1MiB"] * 9)),
            *(("network", wish) for wish in ("lan", "", True, ["isolated"])),
            *(("user", wish) for wish in ("", "a b", "-x", "a\n", "é", 0, "1a")),
            ("colour", "red"),
            ("Cpus", 1),
        ],
    )
    def test_refuses(self, name, wish):
        with pytest.raises(ConfigError) as caught:
            Hardware().changed({name: wish})
        assert name in str(caught.value)

    def test_changes_only_what_is_named(self):
        before = Hardware(cpus=2, memory=GIB)
        after = before.changed({"cpus": 3})
        assert (before.cpus, after.cpus, after.memory) == (2, 3, GIB)

    def test_every_name_is_an_attribute(self):
        assert all(hasattr(Hardware(), name) for name in HARDWARE_NAMES)

    def test_is_a_value(self):
        hardware = Hardware(disks=(MIB,))
        assert pickle.loads(pickle.dumps(hardware)) == hardware
        assert hash(hardware) == hash(Hardware(disks=(MIB,)))


class TestDeadline:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that stands still; sleeping puts it forward."""
        from pytest_vmsandbox.core import deadline

        class Clock:
            now = 100.0

            def monotonic(self):
                return self.now

            def sleep(self, seconds):
                assert seconds >= 0
                self.now += seconds

        clock = Clock()
        monkeypatch.setattr(deadline, "time", clock)
        return clock

    def test_goes_by(self, clock):
        deadline = Deadline(10)
        assert (deadline.elapsed, deadline.remaining(), deadline.expired) == (0, 10, False)
        clock.now += 4
        assert (deadline.elapsed, deadline.remaining(), deadline.expired) == (4, 6, False)
        clock.now += 6
        assert (deadline.remaining(), deadline.expired) == (0, True)
        clock.now += 5
        assert (deadline.elapsed, deadline.remaining()) == (15, 0)

    def test_a_cap_only_lowers(self, clock):
        deadline = Deadline(10)
        assert deadline.remaining(3) == 3
        assert deadline.remaining(30) == 10

    def test_a_pause_does_not_go_beyond_it(self, clock):
        deadline = Deadline(10)
        deadline.pause(7)
        assert deadline.elapsed == 7
        deadline.pause(7)
        assert deadline.elapsed == 10
        deadline.pause(7)
        assert deadline.elapsed == 10

    def test_none_and_endless(self, clock):
        assert Deadline(0).expired
        assert not Deadline(float("inf")).expired
        assert Deadline(float("inf")).remaining(2) == 2
