"""What all kinds of things in the cache have in common; `test_templates` and `test_builder` have the rest."""

import os
import shutil
import subprocess
import sys

import pytest

from pytest_vmsandbox.cache.files import problem
from pytest_vmsandbox.cache.store import ENVIRONMENTS, IMAGES, TEMPLATES, Entry, Store, tidy
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.errors import CacheError, ImageError
from support.images import DEFINITION

PROCESSES = 4
# Makes the thing `key`, which takes until all processes have come.
MAKER = """
import sys, time
from pathlib import Path
from pytest_vmsandbox.cache.store import TEMPLATES, Entry, Store

cache, waiting, made = map(Path, sys.argv[1:4])

def fill(folder, lock):
    with made.open("a") as file:
        file.write("made\\n")
    while len(list(waiting.iterdir())) < int(sys.argv[4]):
        time.sleep(0.01)
    (folder / "file").write_text("content")
    return {"more": "facts"}

store = Store(cache, TEMPLATES, Entry)
entry = store.make("key", fill, on_busy=lambda: (waiting / sys.argv[5]).touch())
with store.hold(entry.folder):
    print((entry.folder / "file").read_text(), entry.record["more"], entry.damage())
"""


def add(cache, kind, key, size=0, at=0):
    """Put something into a cache, which was last used at a time."""

    def fill(folder, _lock):
        (folder / "file").write_bytes(b"x" * size)
        return {}

    made = Store(cache, kind, Entry).make(key, fill, on_busy=lambda: None)
    os.utime(made.folder / "in-use.lock", (at, at))
    return made


def test_several_processes_at_once(tmp_path):
    """One makes it, the others wait and find it."""
    waiting, made = tmp_path / "waiting", tmp_path / "made"
    waiting.mkdir()
    argv = [sys.executable, "-c", MAKER, tmp_path / "cache", waiting, made, str(PROCESSES - 1)]
    processes = [
        subprocess.Popen([*argv, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(PROCESSES)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["content facts \n"] * PROCESSES
    assert made.read_text() == "made\n"
    assert sorted(path.name for path in (tmp_path / "cache" / "templates").iterdir()) == [
        "key",
        "key.lock",
    ]


def test_what_is_kept_is_found_in_a_copy(tmp_path):
    entry = add(tmp_path / "one", TEMPLATES, "key", 8192)
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    found = Store(tmp_path / "two", TEMPLATES, Entry).get("key")
    assert found is not None
    assert (found.record, found.damage()) == (entry.record, "")


def test_who_holds_something_lets_other_users_read_it(tmp_path):
    """QEMU may be one. A copy of the cache may have lost that; the key is nobody else's business."""
    entry = add(tmp_path, TEMPLATES, "one")
    (entry.folder / "key").touch()
    for name in ("file", "key"):
        (entry.folder / name).chmod(0o600)
    with Store.hold(entry.folder):
        modes = [(entry.folder / name).stat().st_mode & 0o777 for name in ("file", "key")]
    assert modes == [0o644, 0o600]


def test_what_older_versions_have_made_is_removed_and_told_once(tmp_path):
    new = add(tmp_path, TEMPLATES, "0" * 64)
    old = tmp_path / "templates" / ("0" * 32)
    old.mkdir()
    (old / "memory").write_bytes(b"x" * 8192)
    said = []
    for _ in range(2):
        tidy(tmp_path, said.append)
    assert not old.exists()
    assert new.damage() == ""
    (line,) = said
    assert line.startswith("removed 8KiB of templates and environments of an older version")


def test_one_limit_holds_for_all_that_is_made_anew(tmp_path):
    kinds = {"t1": TEMPLATES, "e1": ENVIRONMENTS, "t2": TEMPLATES, "e2": ENVIRONMENTS}
    for at, (key, kind) in enumerate(kinds.items(), 1):
        add(tmp_path, kind, key, size=100_000, at=at)
    add(tmp_path, IMAGES, "image/1", size=100_000)
    one = Store(tmp_path, TEMPLATES, Entry).all()[0].size_on_disk
    store = Store(tmp_path, ENVIRONMENTS, Entry)
    with store.hold(store.all()[0].folder):
        os.utime(store.root / "e1" / "in-use.lock", (0, 0))
        store.shrink(limit=3 * one)
        assert not (tmp_path / "templates" / "t1").exists()
        store.shrink(limit=one)
    left = sorted(path.parent.name for path in tmp_path.glob("*/*/in-use.lock"))
    assert left == ["e1"]
    assert (tmp_path / "images" / "image" / "1").exists()


def test_what_cannot_be_read_goes_first(tmp_path):
    for key in ("broken", "whole"):
        add(tmp_path, TEMPLATES, key, size=100_000, at=1)
    shutil.rmtree(tmp_path / "templates" / "broken")
    (tmp_path / "templates" / "broken").mkdir()
    (tmp_path / "templates" / "broken" / "file").write_bytes(b"x" * 100_000)
    store = Store(tmp_path, TEMPLATES, Entry)
    store.shrink(limit=150_000)
    assert [folder.name for folder in store.folders()] == ["whole"]


def test_nothing_is_left_where_the_disk_is_full(tmp_path):
    def fill(folder, _lock):
        (folder / "file").write_text("half")
        raise OSError(28, "No space left on device")

    store = Store(tmp_path, TEMPLATES, Entry)
    with pytest.raises(CacheError, match="No space left") as caught:
        store.make("key", fill, on_busy=lambda: None)
    assert "VMSANDBOX_CACHE" in caught.value.remedy
    assert [path.name for path in store.root.iterdir()] == ["key.lock"]


def test_what_is_in_use_is_not_replaced(tmp_path):
    entry = add(tmp_path, IMAGES, "image/1")
    store = Store(tmp_path, IMAGES, Entry)
    with store.hold(entry.folder), pytest.raises(CacheError, match="is in use"):
        store.make("image/1", lambda *_: {}, on_busy=lambda: None, replace=True)
    assert entry.damage() == ""
    assert store.make("image/1", lambda *_: {"b": 1}, on_busy=lambda: None, replace=True) != entry


def test_a_folder_elsewhere_of_a_killed_process_is_removed(tmp_path):
    """So are the links to folders that are not ours, but not these folders."""
    store = Store(tmp_path, IMAGES, Entry)
    store.root.mkdir()
    base = tmp_path / "tmp"
    for name in ("vmsandbox-work-1", "somebody's"):
        (base / name).mkdir(parents=True)
        (base / name / "file").write_bytes(b"x" * 8192)
    (store.root / ".work-ours").symlink_to(base / "vmsandbox-work-1")
    (store.root / ".work-theirs").symlink_to(base / "somebody's")
    assert store.sweep() == 8192
    assert [path.name for path in base.iterdir()] == ["somebody's"]
    assert list(store.root.iterdir()) == []


def test_a_folder_elsewhere_needs_the_lock_of_its_name(tmp_path):
    """Otherwise another process takes it for that of a killed one."""
    store = Store(tmp_path, TEMPLATES, Entry)

    def fill(_folder, _lock):
        with store.work_folder("k1", tmp_path) as work:
            store.sweep()
            assert work.is_dir()
        with pytest.raises(ValueError, match="nobody makes 'k'"), store.work_folder("k", tmp_path):
            pass
        return {}

    store.make("k1", fill, on_busy=lambda: None)


class TestUnusable:
    """A cache that cannot be used is told as that, and not as an image that is missing."""

    def told(self, cache):
        with pytest.raises(CacheError) as caught:
            ImageStore(cache).require(DEFINITION)
        assert "VMSANDBOX_CACHE" in caught.value.remedy
        return caught.value.brief

    @pytest.fixture(autouse=True)
    def definition(self, monkeypatch):
        monkeypatch.setattr(type(DEFINITION), "digest", "0" * 64)

    def test_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        assert self.told(tmp_path / "file").endswith("/file is not a folder")

    def test_a_folder_below_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        assert "cannot be made, because" in self.told(tmp_path / "file" / "cache")

    def test_one_that_cannot_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert self.told(tmp_path).endswith(" cannot be written")

    def test_one_of_another_user(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert self.told(tmp_path).endswith(" belongs to another user")

    def test_one_that_can_be_used(self, tmp_path):
        assert problem(tmp_path) == problem(tmp_path / "new") == ""
        with pytest.raises(ImageError, match="is not built"):
            ImageStore(tmp_path / "new").require(DEFINITION)
