"""Kept guests in their store: found by their test, limited, private, and complete or not there."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox import ConfigError
from pytest_vmsandbox.cache.store import tidy
from pytest_vmsandbox.cli import kept as commands
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.kept import KeptStore, Moment, harmful, key_of

HERE = "/home/user/project"


def moment(nodeid="tests/test_x.py::test_y[debian-13]", **more):
    usual = {"rootdir": HERE, "number": 1, "phase": "call", "outcome": "failed", "error": "E"}
    return Moment(nodeid=nodeid, **{**usual, **more})


@pytest.fixture
def store(tmp_path):
    return KeptStore(tmp_path / "cache")


@pytest.fixture
def keep(store, tmp_path):
    """Puts a kept guest into the store, with files of some sizes."""

    def put(it, saved_at=1.0, image="debian-13", own=4096, linked=None, kernel=None, group=None):
        def fill(folder, _lock):
            (folder / "state").write_bytes(os.urandom(own))
            (folder / "image").mkdir()
            if linked is not None:
                os.link(linked, folder / "image" / "disk.raw")
            return {
                "moment": asdict(it), "guest": f"{image}-1", "image": image, "saved_at": saved_at,
                "kernel": kernel, "group": group, "hardware": asdict(Hardware(disks=(1 << 20,))), "has_memory": True,
                "answers": True, "qemu": "7.2.22 abc", "accelerator": "tcg",
            }  # fmt: skip

        return store.make(key_of(it), fill, on_busy=lambda: None, replace=True)

    return put


class TestItsRecord:
    def test_comes_back_as_it_was(self, store, keep):
        it = moment(environment=("TOKEN",), stands=True, folder="/root/x")
        keep(it)
        (kept,) = store.all()
        assert kept.moment == it
        assert kept.key == key_of(it) == kept.folder.name
        assert kept.qemu == ("7.2.22", "abc")
        assert kept.hardware == Hardware(disks=(1 << 20,))

    def test_has_one_key_for_each_guest_of_a_test(self):
        keys = {
            key_of(moment()), key_of(moment(number=2)), key_of(moment(rootdir="/other")),
            key_of(moment("tests/test_x.py::test_z[debian-13]")),
        }  # fmt: skip
        assert len(keys) == 4
        assert key_of(moment(phase="teardown", error="other")) in keys

    def test_a_later_failure_replaces_the_earlier_one(self, store, keep):
        keep(moment(error="first"))
        keep(moment(error="second"))
        assert [kept.moment.error for kept in store.all()] == ["second"]

    def test_of_a_wrong_shape_is_unreadable(self, store, keep):
        keep(moment())
        bad = keep(moment(["a"], number=[1]))
        assert [kept.moment.number for kept in store.all()] == [1]
        assert store.unreadable(bad.folder.name)
        assert len(store.find("test_y", HERE)) == 1
        assert tidy(store.root.parent, pytest.fail) == 0


NETWORK = {"number": 0, "ipv4": "10.1.0.0/24", "ipv6": "fd00:1::/64", "addresses": "fixed"}
GROUP = {"id": "a1", "guests": ["db1-1", "db2-1"], "networks": [NETWORK, None]}


class TestTogether:
    def test_those_of_one_moment_and_test(self, store, keep):
        second, first = (keep(moment(number=it), group=GROUP) for it in (2, 1))
        alone = keep(moment(number=3))
        keep(moment(number=4), group={**GROUP, "id": "of another moment"})
        keep(moment("b.py::t[debian-13]"), group=GROUP)
        assert store.together(second) == store.together(first) == [first, second]
        assert store.together(alone) == [alone]
        assert first.group.networks == (NETWORK, None)

    @pytest.mark.parametrize(
        "change",
        [{"id": 1}, {"guests": [1]}, {"networks": ["lan"]}, {"networks": [{**NETWORK, "ipv4": 1}]},
         {"networks": [{}]}, {"more": 1}],
    )  # fmt: skip
    def test_a_wrong_shape_is_unreadable(self, store, keep, change):
        bad = keep(moment(), group={**GROUP, **change})
        assert store.unreadable(bad.folder.name)

    @pytest.mark.parametrize("change", [{"id": "a\x1b"}, {"guests": ["a b"]}, {}])
    def test_names_of_a_stranger_are_plain(self, keep, change):
        it = keep(moment(), group={**GROUP, **change})
        assert harmful(it.record) == ("group" if change else "")


class TestFind:
    @pytest.mark.parametrize(
        "nodeid",
        [
            "tests/test_x.py::test_y[debian-13]", "tests/test_x.py::test_y", "test_x.py::test_y",
            "test_y", "test_y[debian-13]",
        ],
    )  # fmt: skip
    def test_by_an_id(self, store, keep, nodeid, tmp_path):
        keep(moment(number=2), saved_at=1.0)
        keep(moment(), saved_at=2.0)
        keep(moment("tests/test_x.py::test_other[debian-13]"))
        found = store.find(nodeid, HERE)
        assert [kept.moment.number for kept in found] == [1, 2]
        assert {kept.moment.nodeid for kept in found} == {"tests/test_x.py::test_y[debian-13]"}

    @pytest.mark.parametrize(
        ("nodeid", "plain"),
        [("a.py::t[debian-13-x]", "a.py::t[x]"), ("a.py::t[x-debian-13]", "a.py::t[x]"),
         ("a.py::t[debian-13+6.1-x]", "a.py::t[x]"), ("a.py::t[debian-13+6.1]", "a.py::t")],
    )  # fmt: skip
    def test_by_an_id_without_the_image(self, store, keep, nodeid, plain):
        keep(moment(nodeid), kernel={"release": "6.1"} if "+" in nodeid else None)
        assert [kept.moment.nodeid for kept in store.find(plain, HERE)] == [nodeid]

    def test_the_projects_own_ones_come_first(self, store, keep):
        keep(moment(rootdir="/other"))
        keep(moment())
        assert [kept.moment.rootdir for kept in store.find("test_y", HERE)] == [HERE]
        assert [kept.moment.rootdir for kept in store.find("test_y", "/other")] == ["/other"]
        keep(moment("test_y[tiny]", rootdir="/other"), image="tiny")  # matches better there
        assert [kept.moment.rootdir for kept in store.find("test_y", HERE)] == [HERE]

    def test_of_another_project(self, store, keep):
        keep(moment(rootdir="/other"))
        assert [kept.moment.rootdir for kept in store.find("test_y", HERE)] == ["/other"]

    def test_an_exact_id_comes_before_an_end(self, store, keep):
        keep(moment("a/test_x.py::test_y[tiny]"))
        keep(moment("test_x.py::test_y[tiny]"))
        (kept,) = store.find("test_x.py::test_y[tiny]", HERE)
        assert kept.moment.nodeid == "test_x.py::test_y[tiny]"

    def test_without_its_parameters_if_one_is_left(self, store, keep):
        keep(moment("t.py::test_y[debian-13-x y]"))
        assert len(store.find("test_y", HERE)) == len(store.find("t.py::test_y", HERE)) == 1
        keep(moment("t.py::test_y[debian-13-z]"))
        with pytest.raises(ConfigError, match="can be one of 2 tests"):
            store.find("t.py::test_y", HERE)

    def test_several_tests(self, store, keep):
        keep(moment("a.py::test_y[debian-13]"))
        keep(moment("a.py::test_y[tiny]"), image="tiny")
        with pytest.raises(ConfigError, match="can be one of 2 tests") as raised:
            store.find("a.py::test_y", HERE)
        assert raised.value.details == "a.py::test_y[debian-13]\na.py::test_y[tiny]"

    def test_none(self, store, keep):
        with pytest.raises(ConfigError, match="no guest of 'test_z' is kept") as raised:
            store.find("test_z", HERE)
        assert raised.value.remedy == "run the test with --vm-keep=failed"
        keep(moment(rootdir="/other"))
        with pytest.raises(ConfigError) as raised:
            store.find("est_y", HERE)  # only a whole word is an end
        assert raised.value.details.splitlines()[-2:] == [
            "kept are those of:",
            "  tests/test_x.py::test_y[debian-13] (in /other)",
        ]
        assert raised.value.details.startswith("the test was not run with --vm-keep, ")
        assert (
            raised.value.remedy == "name one of these tests, or run the test with --vm-keep=failed"
        )

    def test_none_of_very_many(self, store, keep):
        for number in range(12):
            keep(moment(f"t.py::test_{number:02}[tiny]"), saved_at=number)
        keep(moment("t.py::test_of_others[tiny]", rootdir="/other"), saved_at=99)
        with pytest.raises(ConfigError) as raised:
            store.find("test_z", HERE)
        lines = raised.value.details.splitlines()
        assert lines[-2:] == ["  t.py::test_02[tiny]", "  and 3 more: 'vmsandbox kept list'"]
        assert "  t.py::test_11[tiny]" in lines


class TestItsRoom:
    def test_the_oldest_go_first(self, store, keep):
        told = []
        for number in (3, 1, 2):
            keep(moment(f"t.py::test_{number}[tiny]"), saved_at=number, own=1 << 20)
        size = sum(kept.size_on_disk for kept in store.all())
        store.limit(size, told.append)
        assert len(store.all()) == 3
        store.limit(size - 1, told.append)
        assert {kept.moment.nodeid for kept in store.all()} == {
            "t.py::test_2[tiny]", "t.py::test_3[tiny]",
        }  # fmt: skip
        assert len(told) == 1
        assert "t.py::test_1[tiny] was removed" in told[0]

    def test_files_that_others_have_do_not_count(self, store, keep, tmp_path):
        disk = tmp_path / "disk.raw"
        disk.write_bytes(os.urandom(1 << 20))
        first = keep(moment(), saved_at=1.0, linked=disk)
        second = keep(moment(number=2), saved_at=2.0, linked=disk)
        assert first.size_on_disk < 1 << 20
        disk.unlink()  # the image was removed: now the two have it, but none of them alone
        assert first.size_on_disk < 1 << 20
        store.limit((1 << 20) - 1, lambda _: None)
        assert store.all() == []
        assert not second.folder.exists()

    def test_what_is_said_to_be_freed_is_what_becomes_free(self, store, keep, tmp_path):
        disk = tmp_path / "disk.raw"
        disk.write_bytes(os.urandom(1 << 20))
        first = keep(moment(), linked=disk)
        second = keep(moment(number=2), linked=disk)
        size = first.size_on_disk
        assert store.discard([first.folder]).freed == size < 1 << 20
        disk.unlink()
        assert store.discard([second.folder]).freed == size + (1 << 20)

    def test_what_is_in_use_stays(self, store, keep):
        kept, told = keep(moment()), []
        with store.hold(kept.folder):
            store.limit(0, told.append)
        assert [found.key for found in store.all()] == [kept.key]
        assert told == []
        store.limit(0, told.append)
        assert store.all() == []


class TestItsFiles:
    def test_only_this_user_can_read_them(self, store, keep, tmp_path):
        disk = tmp_path / "disk.raw"
        disk.write_bytes(b"x")
        disk.chmod(0o644)
        before = os.umask(0)
        try:
            kept = keep(moment(), linked=disk)
        finally:
            os.umask(before)
        with ExitStack() as stack:
            stack.enter_context(store.hold(kept.folder))
            modes = {
                os.fspath(path.relative_to(kept.folder)): stat.S_IMODE(path.stat().st_mode)
                for path in (kept.folder, *kept.folder.rglob("*"))
            }
        assert modes == {
            ".": 0o700, "image": 0o700, "state": 0o600, "kept.json": 0o600, "in-use.lock": 0o600,
            "image/disk.raw": 0o644,  # the image's own file, too: others run QEMU on it
        }  # fmt: skip
        assert stat.S_IMODE(store.root.stat().st_mode) == 0o700

    def test_known_digests_are_taken(self, store):
        def fill(folder, _lock):
            (folder / "a").write_bytes(b"a")
            (folder / "b").write_bytes(b"b")
            return {"digests": {"a": "known", "gone": "no"}}

        kept = store.make("0" * 16, fill, on_busy=lambda: None)
        assert kept.record["digests"]["a"] == "known"
        assert set(kept.record["digests"]) == {"a", "b"}
        assert kept.damage() == "a has changed on the disk"

    def test_what_a_killed_process_left_is_removed(self, store, keep, tmp_path):
        kept = keep(moment())
        left = store.root / ".new-0123456789abcdef"
        left.mkdir()
        (left / "state").write_bytes(b"x")
        tidy(tmp_path / "cache", lambda _: None)
        assert not left.exists()
        assert [found.key for found in store.all()] == [kept.key]


def test_one_guest_of_several(store, monkeypatch):
    """It has its name, or is the only one of a machine."""
    names = ("db1-4", "db2-5", "tiny-6", "tiny-7")
    of = SimpleNamespace(nodeid="t.py::test_y")
    found: list[Any] = [SimpleNamespace(guest=it, image="tiny", moment=of) for it in names]
    monkeypatch.setattr(commands, "find", lambda *_: found)
    assert commands.choose(store, "test_y", "db2-5") is found[1]
    assert commands.choose(store, "test_y", "db1") is found[0]
    for name, text in [(None, "4 guests"), ("tiny", "2 guests"), ("db", "no guest 'db'")]:
        with pytest.raises(ConfigError, match=f"{text} of t.py::test_y"):
            commands.choose(store, "test_y", name)
