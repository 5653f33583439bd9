"""The store of templates: what is found, held, damaged, and made room for."""

import hashlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.core.errors import CacheError
from pytest_vmsandbox.core.spec import KIB, MIB
from pytest_vmsandbox.guests.templates import TemplateStore, layer_name
from pytest_vmsandbox.machine import memory

SECONDS = 20  # more than anything here takes
CONTENT = {
    "memory": b"\0" * 300 * KIB + b"memory" + b"\0" * 300 * KIB,
    "state": os.urandom(5000),
    "console": b"Linux version 6\nvmsandbox: ssh\n",
    "key": b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    "disk0.0.qcow2": b"QFI\xfb" + bytes(70000),
    "disk0.1.qcow2": b"QFI\xfb" + bytes(100) + b"second",
    "disk1.0.qcow2": b"QFI\xfb third",
}
LAYERS = [["disk0.0.qcow2", "disk0.1.qcow2"], ["disk1.0.qcow2"]]


def key_of(number):
    return hashlib.sha256(b"%d" % number).hexdigest()


@pytest.fixture
def store(tmp_path):
    return TemplateStore(tmp_path)


def fill(folder, size=0):
    """Put the files of a template into a folder."""
    for name, data in CONTENT.items():
        with memory.create(folder / name, len(data)) as file:
            for start in range(0, len(data), 4 * KIB):
                if any(piece := data[start : start + 4 * KIB]):
                    os.pwrite(file.fileno(), piece, start)
    if size:
        with (folder / "state").open("ab") as state:
            state.write(os.urandom(size))


def filler(size=0, **more):
    def put(folder, _lock):
        fill(folder, size)
        values = {"image": "debian-13", "name": "debian-13", "layers": LAYERS, "facts": {"a": 1}}
        return {**values, "disk": "c0ffee", **more}

    return put


def make(store, number=1, size=0, **more):
    return store.make(key_of(number), filler(size, **more), on_busy=lambda: None)


def test_one_that_another_run_removes_at_once(store, monkeypatch):
    """Who wants to hold it finds it gone, and makes it anew."""
    monkeypatch.setattr(
        store, "shrink", lambda *, keep: store.throw_away(keep.name, store.get(keep.name))
    )
    template = make(store)
    assert store.get(template.key) is None
    with pytest.raises(FileNotFoundError), store.hold(template.folder):
        pass


def limit(monkeypatch, size):
    """Let templates take so many bytes in all."""
    defaults = {"keep": None, "limit": size}
    monkeypatch.setattr(TemplateStore.shrink, "__kwdefaults__", defaults)


def names(store):
    return sorted(it.name for it in store.root.iterdir() if not it.name.endswith(".lock"))


class TestAdopt:
    def test_is_found_afterwards(self, store):
        template = make(store)
        assert TemplateStore(store.root.parent).get(key_of(1)) == template
        assert store.all() == [template]
        assert names(store) == [key_of(1)]
        assert template.key == key_of(1)
        assert (template.image, template.name) == ("debian-13", "debian-13")
        assert template.facts == {"a": 1}
        assert template.disk == "c0ffee"
        assert template.layers == tuple(
            tuple(template.folder / name for name in files) for files in LAYERS
        )
        assert template.damage() == ""

    def test_has_its_files(self, store):
        template = make(store)
        assert template.memory.read_bytes() == CONTENT["memory"]
        assert template.private_key == CONTENT["key"].decode()
        with template.state() as state:
            assert state.read() == CONTENT["state"]
        assert template.record["digests"].keys() == CONTENT.keys()

    def test_keeps_holes(self, store):
        template = make(store)
        assert template.memory.stat().st_blocks * 512 <= 16 * KIB
        assert template.size_on_disk < 200 * KIB

    def test_takes_the_place_of_a_damaged_one(self, store):
        template = make(store)
        (template.folder / "template.json").write_text("{")
        assert store.get(key_of(1)) is None
        assert make(store).damage() == ""
        assert names(store) == [key_of(1)]

    def test_the_folder_is_nobody_elses_business(self, store):
        assert make(store).folder.stat().st_mode & 0o077 == 0
        assert store.root.stat().st_mode & 0o077 == 0

    def test_makes_room(self, store, monkeypatch):
        limit(monkeypatch, 5 * MIB)
        for number in range(4):
            os.utime(make(store, number, size=2 * MIB).folder / "in-use.lock", (number, number))
        assert [it.key for it in store.all()] == [key_of(2), key_of(3)]

    def test_one_that_is_too_large_for_the_limit_is_kept_all_the_same(self, store, monkeypatch):
        limit(monkeypatch, 0)
        make(store, 1)
        make(store, 2)
        assert [it.key for it in store.all()] == [key_of(2)]


class TestFind:
    def test_none(self, store):
        assert store.get(key_of(1)) is None
        assert store.all() == []

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"{", b"{}", b"[]", b"null", b"7", b'"seal"', b"\xff"),
            *(b'{"seal": 1}', b'{"schema": 1, "seal": "x"}'),
        ],
    )
    def test_metadata_that_is_none(self, store, content):
        file = make(store).folder / "template.json"
        file.write_bytes(content)
        assert store.get(key_of(1)) is None
        assert store.all() == []

    def test_one_of_another_schema(self, store):
        file = make(store).folder / "template.json"
        content = integrity.read_record(file)
        integrity.write_record(file, {**content, "schema": content["schema"] + 1})
        assert store.get(key_of(1)) is None

    def test_metadata_is_gone(self, store):
        (make(store).folder / "template.json").unlink()
        assert store.get(key_of(1)) is None
        assert make(store).damage() == ""

    @given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
    @settings(
        deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200
    )
    def test_any_changed_byte_of_the_metadata(self, store, place, bits):
        """It is not found then; unless it still says the same, with other white space."""
        template = store.get(key_of(1)) or make(store)
        file = template.folder / "template.json"
        before = file.read_bytes()
        after = bytearray(before)
        at = int(place * len(before))
        after[at] ^= bits
        file.write_bytes(after)
        try:
            expected = (None, template) if before[at] in b" \n" else (None,)
            assert store.get(key_of(1)) in expected
        finally:
            file.write_bytes(before)


class TestDamage:
    @given(
        name=st.sampled_from(sorted(CONTENT)),
        place=st.floats(0, 1, exclude_max=True),
        bits=st.integers(1, 255),
    )
    @settings(
        deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60
    )
    def test_any_changed_byte(self, store, name, place, bits):
        template = store.get(key_of(1)) or make(store)
        at = int(place * len(CONTENT[name]))
        with (template.folder / name).open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), bytes([CONTENT[name][at] ^ bits]), at)
            assert template.damage() == f"{name} has changed on the disk"
            os.pwrite(file.fileno(), CONTENT[name][at : at + 1], at)
            assert template.damage() == ""

    @pytest.mark.parametrize("name", sorted(CONTENT))
    def test_a_file_that_is_cut_short(self, store, name):
        template = make(store)
        os.truncate(template.folder / name, len(CONTENT[name]) - 1)
        assert name in template.damage()

    @pytest.mark.parametrize("name", sorted(CONTENT))
    def test_a_file_that_is_gone(self, store, name):
        template = make(store)
        (template.folder / name).unlink()
        assert template.damage() == f"{name}: No such file or directory"

    def test_zeros_instead_of_a_hole_are_none(self, store):
        template = make(store)
        template.memory.write_bytes(CONTENT["memory"])
        assert template.damage() == ""


class TestHold:
    def test_keeps_it(self, store):
        template = make(store)
        with store.hold(template.folder), store.hold(template.folder):
            assert store.discard([template.folder]).freed == 0
            store.shrink(limit=0)
            assert store.get(key_of(1)) == template
        assert store.discard([template.folder]).freed > 0
        assert store.get(key_of(1)) is None

    def test_another_process_keeps_it(self, store):
        template = make(store)
        script = (
            "import pathlib, sys, signal\n"
            "from pytest_vmsandbox.guests.templates import TemplateStore\n"
            "store = TemplateStore(pathlib.Path(sys.argv[1]))\n"
            "with store.hold(store.all()[0].folder):\n"
            "    print('held', flush=True)\n"
            "    signal.pause()\n"
        )
        argv = [sys.executable, "-c", script, str(store.root.parent)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"held\n"
                assert store.discard([template.folder]).freed == 0
            finally:
                process.send_signal(signal.SIGKILL)
        assert store.discard([template.folder]).freed > 0

    def test_counts_as_use(self, store):
        for number in (1, 2):
            os.utime(make(store, number).folder / "in-use.lock", (number, number))
        assert [it.key for it in store.all()] == [key_of(1), key_of(2)]
        with store.hold(store.get(key_of(1)).folder):
            pass
        assert [it.key for it in store.all()] == [key_of(2), key_of(1)]

    def test_one_that_is_gone(self, store):
        template = make(store)
        store.discard([template.folder])
        with pytest.raises(FileNotFoundError), store.hold(template.folder):
            pass


class TestRemove:
    def test_leaves_nothing(self, store):
        template = make(store)
        size = template.size_on_disk
        assert store.discard([template.folder]).freed == size > 0
        assert names(store) == []
        assert store.discard([template.folder]).freed == 0

    def test_one_of_which_a_removal_was_interrupted_before(self, store):
        template = make(store)
        gone = template.folder.with_name(".gone-a")
        gone.mkdir()
        (gone / "state").write_text("old")
        assert store.discard([template.folder]).freed > 0
        assert names(store) == []

    def test_shrink_begins_with_what_was_used_least_recently(self, store):
        times = {1: 30, 2: 10, 3: 20}
        for number, at in times.items():
            os.utime(make(store, number, size=MIB).folder / "in-use.lock", (at, at))
        total = sum(it.size_on_disk for it in store.all())
        store.shrink(limit=total)
        assert len(store.all()) == 3
        store.shrink(limit=total - 1)
        assert [it.key for it in store.all()] == [key_of(3), key_of(1)]
        store.shrink(limit=0, keep=store.get(key_of(3)).folder)
        assert [it.key for it in store.all()] == [key_of(3)]

    def test_shrink_goes_on_after_one_that_is_in_use(self, store):
        first, second = make(store, 1), make(store, 2)
        os.utime(first.folder / "in-use.lock", (1, 1))
        with store.hold(first.folder):
            os.utime(first.folder / "in-use.lock", (1, 1))
            store.shrink(limit=0)
            assert store.all() == [first]
        assert not second.folder.exists()


class TestMaking:
    def test_its_folder_is_empty_and_gone_afterwards(self, store):
        def look(folder, _lock):
            assert list(folder.iterdir()) == []
            assert folder.stat().st_mode & 0o777 == 0o700
            fill(folder)
            raise KeyError

        with pytest.raises(KeyError):
            store.make(key_of(1), look, on_busy=lambda: None)
        assert names(store) == []

    def test_what_killed_makers_left_is_removed(self, store):
        """Of this template and of others; not what somebody is making right now."""
        kill_a_maker(store, 1)
        kill_a_maker(store, 2)
        (store.root / ".gone-a").mkdir()
        (store.root / ".gone-a" / "memory").write_text("old")
        other = store.root / f".new-{key_of(4)}"
        other.mkdir()
        with locked(store.root / f"{key_of(4)}.lock"):
            assert len(names(store)) == 4
            store.sweep()
            assert names(store) == [other.name]
        store.sweep()
        assert names(store) == []

    def test_after_a_maker_of_the_same_was_killed(self, store):
        kill_a_maker(store, 1)
        assert make(store, 1).damage() == ""
        assert names(store) == [key_of(1)]

    def test_one_maker_at_a_time(self, store):
        told, order = threading.Event(), []

        def other():
            store.make(key_of(1), filler(), on_busy=told.set)
            order.append("other")

        def wait(folder, lock):
            thread.start()
            assert told.wait(SECONDS)
            order.append("we")
            return filler()(folder, lock)

        thread = threading.Thread(target=other)
        store.make(key_of(1), wait, on_busy=lambda: None)
        thread.join(SECONDS)
        assert order == ["we", "other"]

    def test_others_are_made_meanwhile(self, store):
        said = []

        def meanwhile(folder, lock):
            store.make(key_of(2), filler(), on_busy=lambda: said.append(1))
            return filler()(folder, lock)

        store.make(key_of(1), meanwhile, on_busy=lambda: None)
        assert said == []
        assert {it.key for it in store.all()} == {key_of(1), key_of(2)}

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(CacheError):
            make(TemplateStore(tmp_path / "file"))


def kill_a_maker(store, number):
    """What is left of a process that was killed while it made a template."""
    script = (
        "import pathlib, sys, signal\n"
        "from pytest_vmsandbox.guests.templates import TemplateStore\n"
        "def fill(folder, lock):\n"
        "    (folder / 'memory').write_text('half')\n"
        "    print('made', flush=True)\n"
        "    signal.pause()\n"
        "TemplateStore(pathlib.Path(sys.argv[1])).make(sys.argv[2], fill, on_busy=print)\n"
    )
    argv = [sys.executable, "-c", script, str(store.root.parent), key_of(number)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"made\n"
        finally:
            process.kill()
    assert (store.root / f".new-{key_of(number)}" / "memory").exists()


def test_names_of_layers_differ():
    assert len({layer_name(disk, depth) for disk in range(12) for depth in range(12)}) == 144
