"""`vmsandbox images lock`, `update`, `verify`, and `build` in a project with a lock; no guest is started."""

from __future__ import annotations

import hashlib
import json
import os
from inspect import signature
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.catalogue import archive as archive_module
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.lock import Lock
from pytest_vmsandbox.cli import building, lock as lock_commands
from pytest_vmsandbox.cli.project import Project, ask
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.paths import LOCK_FILE
from support import images

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43
ARCHIVE = "http://archive.example/debian stable 2026-01-01T00:00:00Z -\n"
OLD, NEW = "openssl 3.0.15\nzlib 1\n", "openssl 3.0.16\nzlib 1\n"
RECIPE = f"""\
#!/bin/sh
set -eu
echo kernel >$VMSANDBOX_OUT/vmlinuz
echo initrd >$VMSANDBOX_OUT/initrd.img
echo {KEY} vmsandbox >$VMSANDBOX_OUT/host_key.pub
printf "$PACKAGES" >$VMSANDBOX_OUT/packages.txt
printf '{ARCHIVE}' >$VMSANDBOX_OUT/archive.txt
"""


class Folder:
    """A project with two images, of which its tests use one."""

    def __init__(self, path, monkeypatch):
        self.path, self._monkeypatch = path, monkeypatch
        self.file = path / LOCK_FILE
        (path / "pytest.ini").write_text(
            "[pytest]\nvm_image_path = images\nvm_images = one\naddopts = -p no:randomly --ff\n"
        )
        for name in ("one", "two"):
            toml = images.toml(architecture=native_architecture())
            images.define(path / "images" / name, toml, RECIPE)
        self.packages(OLD)

    def packages(self, text):
        """What the recipes install from now on."""
        self._monkeypatch.setenv("PACKAGES", text.replace("\n", "\\n"))

    def definition(self, name):
        return Catalogue([self.path / "images"]).get(name)

    def keep(self, name="one", packages=OLD):
        return images.keep(
            self.path.parent / "cache", self.definition(name), packages=packages, archive=ARCHIVE
        )

    def run(self, *arguments, status=0, **options):
        """Run `vmsandbox images`; what it says."""
        told: dict[str, Any] = (
            {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
        )
        result = CliRunner(**told).invoke(cli.application, ["images", *arguments], **options)
        assert result.exit_code == status, (result.output, result.exception)
        return result.stdout + result.stderr

    @property
    def locked(self):
        return Lock.read(self.file).images


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project, without pytest being asked about it, and without a network."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(tmp_path / "run"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    folder = Folder(tmp_path / "project", monkeypatch)
    known = Project(rootdir=folder.path, images=("one",), image_path=(folder.path / "images",))
    for module in (lock_commands, cli.project):
        monkeypatch.setattr(module, "ask", lambda _where, _say=None: known)
    monkeypatch.setattr(archive_module, "newer_packages", lambda *_: [])
    return folder


class TestLock:
    def test_the_images_that_the_project_selects(self, project):
        project.keep()
        text = project.run("lock")
        assert "one is locked now: definition " in text
        assert "2 packages, stable of 2026-01-01T00:00:00Z" in text
        assert [*project.locked] == ["one"]

    def test_images_by_name_are_added(self, project):
        for name in ("one", "two"):
            project.keep(name)
        project.run("lock")
        before = project.file.read_text()
        project.run("lock", "tw*")
        assert [*project.locked] == ["one", "two"]
        assert project.file.read_text().startswith(before.rstrip("\n"))

    def test_twice_changes_nothing(self, project):
        project.keep()
        project.run("lock")
        before = project.file.stat()
        assert project.run("lock") == "one is locked\n"
        assert project.file.stat().st_mtime_ns == before.st_mtime_ns

    def test_an_image_that_is_not_built(self, project):
        project.keep("two")
        text = project.run("lock", "one", "two", status=69)
        assert "the image 'one' is not built\nRemedy: vmsandbox images build one" in text
        assert [*project.locked] == ["two"]

    def test_an_entry_is_never_changed(self, project):
        project.keep()
        project.run("lock")
        before = project.file.read_bytes()
        project.keep(packages=NEW)
        text = project.run("lock", status=69)
        assert "packages: openssl 3.0.15 → 3.0.16" in text
        assert "vmsandbox images update one" in text
        assert project.file.read_bytes() == before

    def test_a_wrong_name(self, project):
        assert "there is no image 'three'" in project.run("lock", "three", status=2)
        assert not project.file.exists()

    def test_a_folder_that_cannot_be_written(self, project):
        project.keep()
        project.file.with_name(f".{LOCK_FILE}.new").mkdir()
        text = project.run("lock", status=2)
        assert f"{project.file} cannot be written: Is a directory" in text


class TestUpdate:
    @pytest.fixture
    def newer(self, project, monkeypatch):
        """A locked image, and an archive with a newer package."""
        project.keep()
        project.run("lock")
        found = [("openssl 3.0.15", "openssl 3.0.16")]
        monkeypatch.setattr(archive_module, "newer_packages", lambda *_: found)
        project.packages(NEW)
        return project

    def test_nothing_new(self, project):
        project.keep()
        project.run("lock")
        assert project.run("update") == f"nothing has changed: {project.file} is up to date\n"

    def test_newer_packages_are_shown_and_then_installed(self, newer):
        text = newer.run("update", "--yes")
        shown, _, done = text.partition("building one")
        assert "packages: openssl 3.0.15 → 3.0.16\n" in shown
        assert "the archive has newer packages (1), so it is built again" in shown
        assert "one is locked now" in done
        assert newer.locked["one"].packages == ("openssl 3.0.16", "zlib 1")
        assert newer.run("verify") == "one: intact, and as it is locked\n"

    def test_after_a_colleague_has_updated_the_lock(self, newer):
        newer.run("update", "--yes")
        before = newer.file.read_bytes()
        newer.keep(packages=OLD)
        text = newer.run("update", "--yes")
        assert text.startswith("one\n  the archive has newer packages (1), so it is built again\n")
        assert newer.file.read_bytes() == before

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            (["--dry-run"], 0, "3.0.15 → 3.0.16"),
            (["--dry-run", "--yes"], 0, "3.0.15 → 3.0.16"),
            ([], 2, "add --yes, or only look: vmsandbox images update --dry-run"),
        ],
    )
    def test_nothing_is_done_unasked(self, newer, arguments, status, says):
        before = newer.file.read_bytes()
        text = newer.run("update", *arguments, status=status)
        assert says in text
        assert "building" not in text
        assert newer.file.read_bytes() == before

    @pytest.mark.parametrize("answer", ["n", "y"])
    def test_at_a_terminal_it_asks(self, newer, monkeypatch, answer):
        monkeypatch.setattr(lock_commands, "_is_terminal", lambda: True)
        text = newer.run("update", input=f"{answer}\n", status=0 if answer == "y" else 130)
        assert text.index("3.0.15 → 3.0.16") < text.index("Make these changes?")
        assert ("building one" in text) == (answer == "y")

    def test_with_newer_packages_the_base_is_made_again_first(self, newer, monkeypatch):
        folder = newer.path / "images" / "child"
        folder.mkdir()
        (folder / "image.toml").write_text('schema = 1\ndescription = "x"\nfrom = "one"\n')
        newer.keep("child")
        newer.run("lock", "child")
        built = []

        def build_one(definition, _settings, *, force=False):
            built.append((definition.name, force))
            newer.keep(definition.name, packages=NEW)

        monkeypatch.setattr(building, "build_one", build_one)
        newer.run("update", "child", "--yes")
        assert built == [("one", True), ("child", True)]
        for name in ("one", "child"):
            assert newer.locked[name].packages == ("openssl 3.0.16", "zlib 1")

    def test_another_image_here_is_taken_without_a_build(self, project):
        project.keep()
        project.run("lock")
        project.keep(packages=NEW)
        text = project.run("update", "--yes")
        assert "packages: openssl 3.0.15 → 3.0.16" in text
        assert "building" not in text
        assert project.locked["one"].packages == ("openssl 3.0.16", "zlib 1")

    def test_a_changed_definition_is_built(self, project):
        project.keep()
        project.run("lock")
        before = project.definition("one").digest
        (project.path / "images" / "one" / "more").write_text("more")
        after = project.definition("one").digest
        text = project.run("update", "--yes")
        assert f"definition: {before[:16]}… → {after[:16]}…" in text
        assert project.locked["one"].definition == after

    def test_offline_the_archive_is_not_asked(self, newer):
        assert "nothing has changed" in newer.run("update", "--offline")

    def test_offline_nothing_is_built(self, project):
        project.keep()
        project.run("lock")
        (project.path / "images" / "one" / "more").write_text("more")
        before = project.file.read_bytes()
        text = project.run("update", "--yes", "--offline", status=69)
        assert "one cannot be built offline" in text
        assert project.file.read_bytes() == before

    def test_if_one_build_fails_the_other_images_are_locked(self, project):
        for name in ("one", "two"):
            project.keep(name)
        project.run("lock", "one", "two")
        (project.path / "images" / "one" / "build").write_text("#!/bin/sh\nexit 3\n")
        (project.path / "images" / "two" / "more").write_text("more")
        before = project.locked
        text = project.run("update", "--yes", status=69)
        assert "its recipe ended with status 3" in text
        assert project.locked["one"] == before["one"]
        assert project.locked["two"].definition == project.definition("two").digest

    def test_without_a_lock(self, project):
        text = project.run("update", status=2)
        assert "add images: vmsandbox images lock" in text
        project.keep()
        assert "one is locked now" in project.run("update", "one", "--yes")


class TestVerify:
    def test_without_a_lock(self, project):
        project.keep("two")
        assert project.run("verify", "two") == "two: intact\n"
        assert "two: intact\n" in project.run("verify")

    def test_a_damaged_file(self, project):
        image = project.keep()
        (image.folder / "vmlinuz").write_text("another kernel")
        text = project.run("verify", "one", status=1)
        assert text == (
            "one: vmlinuz has changed on the disk. "
            "Remedy: vmsandbox images build one --image-path=images --force\n"
        )

    def test_each_difference_takes_a_line(self, project):
        project.keep()
        project.run("lock")
        project.keep(packages="openssl 3.0.16\n")
        assert project.run("verify", status=1).splitlines() == [
            "one: packages: openssl 3.0.15 → 3.0.16. Remedy: vmsandbox images update one",
            "one: packages: zlib 1 → none. Remedy: vmsandbox images update one",
        ]

    def test_what_is_not_there(self, project):
        for name in ("one", "two"):
            project.keep(name)
        project.run("lock", "one")
        assert "two: is not in vm-images.lock" in project.run("verify", "two", status=1)
        project.run("rm", "one", "--image-path=images")
        assert "one: the image 'one' is not built" in project.run("verify", status=1)
        text = project.file.read_text()
        project.file.write_text(text.replace('name = "one"', 'name = "three"'))
        text = project.run("verify", status=1)
        assert "three: vm-images.lock has an image 'three', but there is no such image" in text
        assert "remove its table [[image]]" in project.run("update", status=2)

    def test_json(self, project):
        project.keep()
        project.run("lock")
        image = project.keep(packages=NEW)
        content = json.loads(project.run("verify", "--json", status=1))
        assert content["schema"] == 1
        assert content["lock"] == str(project.file)
        (one,) = content["images"]
        assert (one["name"], one["ok"], one["drift"]) == ("one", False, [])
        assert "openssl 3.0.15 → 3.0.16" in one["problems"][0]
        assert image.folder.exists()


class TestBuild:
    def test_packages_that_drift_are_told(self, project):
        project.keep()
        project.run("lock")
        before = project.file.read_bytes()
        project.packages(NEW)
        text = project.run("build", "one", "--force", "--image-path=images")
        assert "  packages: openssl 3.0.15 → 3.0.16\n" in text
        assert "vmsandbox images update one" in text
        assert project.file.read_bytes() == before

    def test_the_same_again_with_the_folders_of_the_project(self, project):
        project.keep()
        project.run("lock")
        assert project.run("build", "one") == "one is built\n"

    def test_an_image_that_the_lock_lacks(self, project):
        project.keep()
        project.run("lock")
        text = project.run("build", "two", "--image-path=images")
        assert "two is not in vm-images.lock. To add it, run 'vmsandbox images lock two'" in text

    def test_offline(self, project):
        project.keep()
        assert "one is built" in project.run("build", "one", "--offline", "--image-path=images")
        text = project.run("build", "two", "--offline", "--image-path=images", status=69)
        assert "two cannot be built offline, because that may use the network" in text


class TestSource:
    """An image of a file from elsewhere, whose digest is looked up in a list."""

    DISK = (b"a disk" * 1000).ljust(1 << 20, b"\0")

    @pytest.fixture
    def source(self, project):
        """Its definition. The list has the digest of the file that is there now."""
        folder = project.path / "images" / "far"
        folder.mkdir()
        (folder / "image.toml").write_text(
            'schema = 1\ndescription = "x"\narchitecture = "x86_64"\n[source]\nurl = "disk"\nformat = "raw"\n'
            'checksums = "../SUMS"\n[disk]\nsize = "1MiB"\n[boot]\nfirmware = "uefi"\n[system]\ninit = "none"\n'
            'python = false\n[login]\nmethod = "none"\nready = "login:"\n'
        )
        (folder / "disk").write_bytes(self.DISK)
        digest = hashlib.sha256(self.DISK).hexdigest()
        (project.path / "images" / "SUMS").write_text(f"{digest}  disk\n")
        record = {"url": "disk", "sha256": "a" * 64, "checked": "list of digests over a path"}
        images.keep(project.path.parent / "cache", project.definition("far"), source=record)
        project.run("lock", "far")
        return digest

    @pytest.mark.parametrize("command", ["build", "fetch"])
    def test_another_file_is_refused(self, project, source, command):
        before = project.file.read_bytes()
        text = project.run(command, "far", "--force", "--image-path=images", status=69)
        assert "disk does not have its digest" in text
        assert f"sha256 stated: {'a' * 64}\nsha256 found:  {source}" in text
        assert f"The digests are those in {project.file}. 'vmsandbox images update far'" in text
        assert project.file.read_bytes() == before

    def test_update_shows_what_the_list_says_now(self, project, source):
        text = project.run("update", "far", "--dry-run")
        assert f"  source: {'a' * 16}… → {source[:16]}… (in ../SUMS)\n" in text
        assert "nothing has changed" in project.run("update", "far", "--offline")


class TestAsk:
    """pytest says what the project is, however it is configured."""

    @pytest.fixture
    def there(self, tmp_path, monkeypatch):
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        below = tmp_path / "project" / "below"
        below.mkdir(parents=True)
        monkeypatch.chdir(below)
        return Folder(tmp_path / "project", monkeypatch)

    def test_from_a_folder_below(self, there):
        (there.path / "conftest.py").write_text(
            "def pytest_vmsandbox_images(config):\n    return [config.rootpath / 'more']\n"
        )
        images.define(there.path / "more" / "three", images.toml())
        found = ask([])
        assert found.rootdir == there.path
        assert found.images == ("one",)
        assert found.image_path == (there.path / "images", there.path / "more")
        assert (found.is_locked, found.lock.images) == (False, {})
        assert os.listdir(there.path / "below") == []

    def test_with_options_of_pytest(self, there, monkeypatch):
        monkeypatch.setenv("PYTEST_ADDOPTS", "-n2 --vm=two")
        (there.path / "other.ini").write_text("[pytest]\nvm_image_path = images\n")
        found = ask(["-c", "../other.ini", "--rootdir", "."])
        assert found.rootdir == there.path / "below"
        assert found.images == ("two",)

    def test_what_markers_name(self, there):
        (there.path / "below" / "test_x.py").write_text(
            "import pytest\n\n@pytest.mark.vm('two')\ndef test_x(vm): pass\n"
        )
        said = []
        assert ask([], said.append).images == ("one", "two")
        assert said == []
        (there.path / "below" / "test_y.py").write_text("import nothing_of_that_name\n")
        assert ask([], said.append).images == ("one", "two")
        assert len(said) == 1
        assert "some tests cannot be collected here" in said[0]

    def test_an_image_that_is_not_there(self, there):
        (there.path / "pytest.ini").write_text("[pytest]\nvm_images = four\n")
        with pytest.raises(ConfigError, match="there is no image 'four'"):
            ask([])

    def test_a_project_whose_pytest_does_not_start(self, there):
        (there.path / "pytest.ini").write_text("[pytest]\naddopts = --nonsense\n")
        with pytest.raises(ConfigError, match="pytest cannot say which images") as caught:
            ask([])
        assert "--nonsense" in caught.value.details
        assert "pytest --vm-list" in caught.value.remedy
