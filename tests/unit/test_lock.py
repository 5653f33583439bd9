"""The lock file: what it says of images, what it accepts, and that it is never damaged."""

from __future__ import annotations

import os
import platform
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.lock import Lock, LockedImage, changes, read_or_empty
from pytest_vmsandbox.core.errors import ConfigError, ImageError, LockError
from pytest_vmsandbox.core.paths import LOCK_FILE, lock_file
from support import images

PACKAGES = "openssl 3.0.15\nsystemd 257\n"
ARCHIVE = (
    "http://archive.example/debian trixie 2026-01-01T00:00:00Z 00112233445566778899AABBCCDDEEFF\n"
    "http://archive.example/security trixie-security 2026-01-02T00:00:00Z -\n"
)
SOURCE = {
    "url": "http://images.example/a.qcow2",
    "sha256": "a" * 64,
    "checked": "a list over https",
}


@pytest.fixture
def definition(tmp_path):
    images.define(tmp_path / "images" / "mine", images.toml())
    return ImageDefinition.read(tmp_path / "images" / "mine")


@pytest.fixture
def built(tmp_path, definition):
    """Make an image."""

    def built(packages=PACKAGES, archive=ARCHIVE, **record):
        return images.keep(
            tmp_path / "cache", definition, packages=packages, archive=archive, **record
        )

    return built


@pytest.fixture
def file(tmp_path):
    (tmp_path / "project").mkdir()
    return tmp_path / "project" / LOCK_FILE


@pytest.fixture
def locked(file, built):
    """The lock file of a project that uses one image."""
    Lock(file, {}).add([LockedImage.of(built())])
    return file


class TestEntry:
    def test_of_an_image_that_a_recipe_has_built(self, built, definition):
        entry = LockedImage.of(built())
        assert (entry.name, entry.origin, entry.base) == ("mine", "recipe", "")
        assert entry.definition == definition.digest
        assert entry.packages == ("openssl 3.0.15", "systemd 257")
        assert entry.archive == (
            "http://archive.example/debian trixie 2026-01-01T00:00:00Z",
            "http://archive.example/security trixie-security 2026-01-02T00:00:00Z",
        )
        assert entry.signature == "the archive's, by the keys 8899AABBCCDDEEFF"
        assert entry.locked == ("definition", "packages")
        assert entry.may_drift == ("archive", "files")

    def test_of_one_without_lists(self, built):
        entry = LockedImage.of(built(packages=None, archive=None))
        assert (entry.packages, entry.archive, entry.signature) == ((), (), "none")
        assert (entry.locked, entry.may_drift) == (("definition",), ("files",))

    def test_of_one_with_a_source(self, built):
        entry = LockedImage.of(built(packages=None, archive=None, source=SOURCE))
        assert entry.places == {"url": SOURCE["url"]}
        assert entry.digests == {"sha256": SOURCE["sha256"]}
        assert entry.signature == "none; a list over https"
        assert entry.locked == ("definition", "source")

    def test_of_a_derived_one(self, tmp_path, definition, file):
        folder = tmp_path / "images" / "child"
        folder.mkdir()
        (folder / "image.toml").write_text(
            'schema = 1\ndescription = "x"\nfrom = "mine"\n[add]\npackages = ["nginx"]\n'
        )

        def child():
            return Catalogue([tmp_path / "images"], tmp_path / "cache").get("child")

        entry = LockedImage.of(
            images.keep(tmp_path / "cache", child(), packages=PACKAGES, source=SOURCE)
        )
        assert (entry.origin, entry.base) == ("from", "mine")
        assert entry.locked == ("definition", "source", "packages")
        lock = Lock(file, {}).add([entry])
        lock.check_definition(child())
        (definition.folder / "more").write_text("the base is another one now")
        with pytest.raises(LockError, match="'child' differs from vm-images.lock: definition"):
            lock.check_definition(child())

    def test_a_changed_list_is_damage(self, built):
        image = built()
        (image.folder / "packages.txt").write_text("openssl 9\n")
        with pytest.raises(ImageError, match=r"packages.txt has changed.*"):
            LockedImage.of(image)

    def test_reads_no_large_file(self, built, monkeypatch):
        image = built()
        for name in ("vmlinuz", "initrd.img"):
            (image.folder / name).unlink()
        assert LockedImage.of(image).name == "mine"


def test_it_can_be_read_again(locked, built):
    assert Lock.read(locked).images == {"mine": LockedImage.of(built())}


def test_people_can_review_it(locked, built, definition):
    text = locked.read_text()
    assert text.startswith("# The images that this project's tests use.")
    assert "vmsandbox images update" in text.partition("schema")[0]
    assert '\n    "openssl 3.0.15",\n    "systemd 257",\n' in text
    assert tomllib.loads(text)["schema"] == 1
    lines = re.findall(r"(?m)^(\w+) =", text.partition("[[image]]")[2])
    assert lines == [
        *("name", "origin", "definition", "archive", "signature", "locked", "may_drift", "packages")
    ]


def test_the_order_is_stable(file, built):
    entry = LockedImage.of(built())
    entries = [replace(entry, name=name) for name in ("b", "a", "c")]
    one = Lock(file, {}).with_images(entries)
    other = Lock(file, {}).with_images(entries[:1]).with_images(reversed(entries))
    assert one.text() == other.text()
    assert re.findall(r'name = "(\w)"', one.text()) == ["a", "b", "c"]


class TestCheck:
    def test_the_same_image(self, locked, built, definition):
        lock = Lock.read(locked)
        lock.check_definition(definition)
        assert lock.check(built()) == []

    def test_another_image(self, locked, definition):
        with pytest.raises(LockError, match="'other' is not in vm-images.lock") as caught:
            Lock.read(locked).check_definition(replace(definition, name="other"))
        text = str(caught.value)
        assert text.startswith("[image] ")
        assert "found: mine" in text
        assert "Remedy: vmsandbox images lock other" in text

    def test_another_definition(self, locked, definition):
        (definition.folder / "more").write_text("more")
        changed = ImageDefinition.read(definition.folder)
        with pytest.raises(LockError, match="'mine' differs from vm-images.lock") as caught:
            Lock.read(locked).check_definition(changed)
        assert f"{definition.digest[:16]}… → {changed.digest[:16]}…" in caught.value.details
        assert "vmsandbox images update mine" in caught.value.remedy

    def test_other_packages(self, locked, built):
        with pytest.raises(LockError, match="differs from vm-images.lock: packages") as caught:
            Lock.read(locked).check(built(packages="openssl 3.0.16\nnginx 1\n"))
        assert caught.value.details.splitlines()[1:] == [
            "  packages: nginx none → 1",
            "  packages: openssl 3.0.15 → 3.0.16",
            "  packages: systemd 257 → none",
        ]

    def test_an_older_image_is_built_again(self, locked, built):
        """A colleague has updated the lock."""
        old = built(packages="openssl 3.0.14\n", archive=ARCHIVE.replace("2026", "2025"))
        with pytest.raises(LockError) as caught:
            Lock.read(locked).check(old)
        remedy = caught.value.remedy
        assert remedy.startswith(
            "the image here is older than the lock. Run 'vmsandbox images build"
        )
        assert remedy.endswith(" --force'")

    def test_many_packages_take_few_lines(self, locked, built):
        with pytest.raises(LockError) as caught:
            Lock.read(locked).check(built(packages="".join(f"p{n} 1\n" for n in range(100))))
        lines = caught.value.details.splitlines()
        assert len(lines) == 12
        assert lines[-1] == "  … and 92 more"

    def test_another_source(self, file, built):
        Lock(file, {}).add([LockedImage.of(built(source=SOURCE))])
        with pytest.raises(LockError, match="differs from vm-images.lock: source") as caught:
            Lock.read(file).check(built(source={**SOURCE, "sha256": "b" * 64}))
        assert "aaaaaaaaaaaaaaaa… → bbbbbbbbbbbbbbbb…" in caught.value.details

    def test_what_may_drift(self, locked, built):
        found = built(archive=ARCHIVE.replace("2026-01-01", "2026-02-02"))
        (difference,) = Lock.read(locked).check(found)
        assert str(difference) == "archive: trixie 2026-01-01T00:00:00Z → 2026-02-02T00:00:00Z"

    def test_another_mirror_is_no_difference(self, locked, built):
        assert (
            Lock.read(locked).check(built(archive=ARCHIVE.replace("archive.ex", "mirror.ex"))) == []
        )

    def test_packages_that_may_drift(self, locked, built):
        text = locked.read_text().replace('    "packages",\n', "", 1)
        locked.write_text(text.replace('    "archive",', '    "archive",\n    "packages",'))
        lock = Lock.read(locked)
        assert lock.images["mine"].locked == ("definition",)
        newer = built(packages="openssl 3.0.16\nsystemd 257\n")
        assert [*map(str, lock.check(newer))] == ["packages: openssl 3.0.15 → 3.0.16"]
        kept = LockedImage.of(newer).kept(lock.images["mine"])
        assert kept.locked == ("definition",)
        assert "packages" in kept.may_drift
        assert kept.packages == ("openssl 3.0.16", "systemd 257")


def test_several_versions_of_a_package():
    before = ["kernel 1", "kernel 2", "zlib 1"]
    assert changes(before, ["kernel 2", "kernel 3", "zlib 1"]) == ["kernel 1, 2 → 2, 3"]


WRONG = [
    ("schema = 1", "schema = 2", "schema = 2 is not known"),
    ("schema = 1", "schema = true", "schema = True is not known"),
    ("schema = 1", "", "schema = None is not known"),
    ("[[image]]", "[image]", "image = "),
    ("[[image]]", "[[images]]", "unknown key 'images'"),
    ('name = "mine"', "", "missing key 'image 1: name'"),
    ('name = "mine"', 'name = "../mine"', "is not a name for an image"),
    ('origin = "recipe"', 'origin = "heaven"', "origin = 'heaven' is not allowed"),
    ("definition = ", "definitions = ", "unknown key 'image mine: definitions'"),
    ('definition = "', 'definition = "x', "image mine: definition = "),
    ('    "definition",\n', "", "missing key 'image mine: locked'"),
    ('    "packages",\n', '    "everything",\n', "locked = "),
    ('    "files",\n', '    "definition",\n', "may_drift = "),
    ('    "openssl 3.0.15",', "    3,", "packages = "),
    ('    "files",\n', '    "packages",\n', "both locked and may drift"),
    ("[[image]]", "<<<<<<< HEAD\n[[image]]", "conflict markers"),
    ("[[image]]", "=======\n[[image]]", "conflict markers"),
    ("archive = [\n", 'archive = [\n    " ",\n', "archive = "),
    ("[[image]]", "[[image", "cannot be read"),
    ("[[image]]", f"x = {'[' * 5000}", "cannot be read"),
]


@pytest.mark.parametrize(("right", "wrong", "says"), WRONG, ids=[says for *_, says in WRONG])
def test_a_wrong_file_is_an_error_with_file_and_remedy(locked, right, wrong, says):
    head, schema, text = locked.read_text().partition("schema = 1")
    assert right in schema + text
    locked.write_text(head + (schema + text).replace(right, wrong, 1))
    with pytest.raises(ConfigError) as caught:
        Lock.read(locked)
    assert says in caught.value.brief
    assert str(locked) in caught.value.brief
    assert caught.value.remedy


def test_two_entries_for_an_image(locked):
    text = locked.read_text()
    locked.write_text(text + text[text.index("[[image]]") :])
    with pytest.raises(ConfigError, match="two entries for the image 'mine'"):
        Lock.read(locked)


@pytest.mark.parametrize("how", ["CRLF", "BOM"])
def test_files_of_other_editors(locked, how):
    before = Lock.read(locked)
    content = locked.read_bytes()
    locked.write_bytes(
        content.replace(b"\n", b"\r\n") if how == "CRLF" else b"\xef\xbb\xbf" + content
    )
    assert Lock.read(locked) == before


@pytest.mark.parametrize("what", ["missing", "a folder", "a broken link", "a FIFO"])
def test_what_cannot_be_read(file, what):
    if what == "a folder":
        file.mkdir()
    elif what == "a broken link":
        file.symlink_to("nowhere")
    elif what == "a FIFO":
        os.mkfifo(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        Lock.read(file)


def test_an_image_that_was_made_with_a_lock_has_the_signature_of_the_lock(file, built):
    locked = LockedImage.of(built(source=SOURCE))
    found = LockedImage.of(built(source={**SOURCE, "checked": "given by the lock file"}))
    assert locked.differences(found) == []
    assert found.kept(locked) == locked


class TestWriting:
    @pytest.fixture
    def more(self, built):
        return [replace(LockedImage.of(built()), name="more")]

    def test_a_link_stays_one(self, locked, more, tmp_path):
        place = tmp_path / "elsewhere.lock"
        locked.rename(place)
        locked.symlink_to(place)
        Lock.read(locked).add(more)
        assert locked.is_symlink()
        assert [*Lock.read(place).images] == ["mine", "more"]

    def test_its_mode_stays(self, locked, more):
        locked.chmod(0o640)
        Lock.read(locked).add(more)
        assert locked.stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize("at", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_old_file(self, locked, more, monkeypatch, at):
        def full(*_):
            raise OSError(28, "No space left on device")

        before = locked.read_bytes()
        lock = Lock.read(locked)
        monkeypatch.setattr(*((os, "fsync") if at == "fsync" else (Path, "replace")), full)
        with pytest.raises(ConfigError, match="cannot be written: No space left"):
            lock.add(more)
        assert locked.read_bytes() == before
        assert os.listdir(locked.parent) == [LOCK_FILE]

    def test_what_a_killed_writer_left_does_no_harm(self, locked, more):
        left = locked.with_name(f".{LOCK_FILE}.new")
        left.write_text("half of a fi")
        Lock.read(locked).add(more)
        assert os.listdir(locked.parent) == [LOCK_FILE]
        assert [*Lock.read(locked).images] == ["mine", "more"]

    def test_two_writers_lose_nothing(self, locked, more):
        one, other = Lock.read(locked), Lock.read(locked)
        one.add(more)
        assert [*other.add([replace(more[0], name="other")]).images] == ["mine", "more", "other"]

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be written"):
            Lock(tmp_path / "nowhere" / LOCK_FILE, {}).add([])


def test_a_project_without_a_lock(tmp_path):
    assert lock_file(tmp_path) is None
    assert read_or_empty(tmp_path / LOCK_FILE).images == {}


# -- several architectures ----------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Fake the name of this machine's architecture."""

    def machine(name):
        monkeypatch.setattr(platform, "machine", lambda: name)

    machine("x86_64")
    return machine


@pytest.fixture
def several(tmp_path, machine):
    """A catalogue of an image for two architectures, and of one that derives from it."""
    text = images.toml().replace('architecture = "x86_64"', 'architectures = ["x86_64", "aarch64"]')
    images.define(tmp_path / "images" / "deb-1", text)
    (tmp_path / "images" / "web").mkdir()
    (tmp_path / "images" / "web" / "image.toml").write_text(
        'schema = 1\ndescription = "x"\nfrom = "deb-1"\n'
    )

    def keep(name):
        catalogue = Catalogue([tmp_path / "images"])
        return images.keep(tmp_path / "cache", catalogue.get(name))

    return keep


def test_a_lock_has_an_entry_for_each_architecture(several, file, machine):
    """It is the same file, whichever machine has written which entry."""
    names = ("deb-1", "deb-1_arm64", "web", "web_arm64")
    Lock(file, {}).add([LockedImage.of(several(name)) for name in names])
    text = file.read_text()
    entries = tomllib.loads(text)["image"]
    assert [(entry["name"], entry["architecture"], entry.get("base")) for entry in entries] == [
        ("deb-1", "aarch64", None),
        ("deb-1", "x86_64", None),
        ("web", "aarch64", "deb-1"),
        ("web", "x86_64", "deb-1"),
    ]
    assert sorted(Lock.read(file).images) == sorted(names)
    machine("aarch64")
    lock = Lock.read(file)
    assert {entry.name: entry.architecture for entry in lock.images.values()} == {
        "deb-1": "aarch64",
        "deb-1_amd64": "x86_64",
        "web": "aarch64",
        "web_amd64": "x86_64",
    }
    for name in lock.images:
        assert lock.check(several(name)) == []
    assert lock.add([LockedImage.of(several("web"))]).text() == text


def test_an_image_of_another_architecture_is_not_the_locked_one(several, file, machine):
    Lock(file, {}).add([LockedImage.of(several("deb-1"))])
    machine("aarch64")
    with pytest.raises(LockError, match="the image 'deb-1' is not in vm-images.lock") as raised:
        Lock.read(file).check(several("deb-1"))
    assert raised.value.details.endswith("found: deb-1_amd64")
    assert raised.value.remedy == "vmsandbox images lock deb-1"
    Lock.read(file).add([LockedImage.of(several("deb-1"))])
    assert [*Lock.read(file).images] == ["deb-1", "deb-1_amd64"]


def test_an_entry_of_an_older_version_is_replaced(several, file):
    entry = LockedImage.of(several("deb-1"))
    Lock(file, {}).add([replace(entry, architecture="", definition="0" * 64)])
    assert "architecture" not in tomllib.loads(file.read_text())["image"][0]
    with pytest.raises(LockError, match="differs from vm-images.lock: definition"):
        Lock.read(file).check(several("deb-1"))
    Lock.read(file).add([entry])
    assert [entry["architecture"] for entry in tomllib.loads(file.read_text())["image"]] == [
        "x86_64"
    ]


def test_the_architecture_of_an_entry_is_known(locked):
    locked.write_text(locked.read_text().replace("[[image]]", '[[image]]\narchitecture = "arm64"'))
    with pytest.raises(ConfigError, match="image mine: architecture = 'arm64' is not allowed"):
        Lock.read(locked)
