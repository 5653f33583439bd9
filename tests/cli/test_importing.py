"""``vmsandbox images import``, ``fetch`` and ``rm``: all but the first boot of what was imported."""

import hashlib
import http.server
import json
import os
import threading
import tomllib
from functools import partial
from inspect import signature
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.catalogue.builder import build
from pytest_vmsandbox.catalogue.importing import describing
from pytest_vmsandbox.catalogue.importing.maker import make
from pytest_vmsandbox.catalogue.importing.source import SourceFile
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.guests.images import maker as image_maker
from support import disks
from support.definitions import DISK, toml, write
from support.disks import made

NONE = ("--login=none", "--ready=login:", "--python=no", "--init=none")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and makers that leave out the first boot."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def without_boot(definition, settings, *, progress, force=False, **_):
        filled = partial(make, cache=cache_dir(), offline=settings.offline)
        return build(definition, ImageStore(cache_dir()), filled, progress=progress, force=force)

    monkeypatch.setattr(image_maker, "make_image", without_boot)
    monkeypatch.setattr("pytest_vmsandbox.cli.building.make_image", without_boot)
    return tmp_path / "cache"


@pytest.fixture
def run(cache):
    options: dict[str, Any] = (
        {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    )

    def run(*arguments, status=0):
        done = CliRunner(**options).invoke(cli.application, ["images", *map(str, arguments)])
        assert done.exit_code == status, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
        return done.stdout + done.stderr

    return run


@pytest.fixture
def put(tmp_path):
    def put(contents):
        for name, data in contents.items():
            (tmp_path / name).write_bytes(data)
        return [tmp_path / name for name in contents]

    return put


def definition(cache, name):
    return tomllib.loads((cache / "imported" / name / "image.toml").read_text(encoding="utf-8"))


def state(run, name):
    found = json.loads(run("list", "--json"))["images"]
    return next((image["state"] for image in found if image["name"] == name), "")


def disk_of(cache, name):
    return next((cache / "images" / name).glob("*/disk.raw")).read_bytes()


def test_a_disk_becomes_an_image_and_goes_again(run, put, cache):
    (file,) = put(made("qcow2-v3"))
    said = run("import", "mine", file, *NONE)
    for word in (
        "format: qcow2",
        "by what the file holds",
        "firmware: bios",
        "architecture:",
        "wrote",
        "is built",
    ):
        assert word in said
    written = definition(cache, "mine")
    assert written["source"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (cache / "imported/mine" / written["source"]["url"]).resolve() == file
    assert written["disk"] == {"size": "3MiB"}
    assert written["login"] == {"method": "none", "ready": "login:"}
    assert disk_of(cache, "mine") == disks.content()
    assert state(run, "mine") == "built"
    assert "removed mine" in run("rm", "mine")
    assert state(run, "mine") == ""
    assert not (cache / "imported/mine").exists()
    assert file.exists()


def test_the_files_of_a_split_disk_are_kept_as_one(run, put, cache):
    files = put(made("vmdk-split-flat"))
    run("import", "split", *files, *NONE)
    assert disk_of(cache, "split") == disks.content()
    for file in files:
        file.unlink()
    run("build", "split", "--force", "--offline")
    assert disk_of(cache, "split") == disks.content()
    run("rm", "split")
    assert list((cache / "downloads").glob("[!.]*/*")) == []


def test_a_part_of_a_split_disk_is_missing(run, put, cache):
    first, *_ = put(made("vmdk-split"))
    said = run("import", "split", first, *NONE, status=69)
    assert "give all of them in one command; missing: disk-s001.vmdk" in said
    assert not (cache / "imported").exists()


def test_a_box_says_how_it_boots_and_who_logs_in(run, put):
    (file,) = put({"a.box": disks.tar(disks.box("vmware_desktop"), "w:gz")})
    said = run("import", "boxed", file, "--dry-run")
    assert "format: box" in said
    assert "firmware: uefi  (as the box says" in said
    assert "login: vagrant  (boxes have the well-known key of Vagrant, which is replaced)" in said
    assert "wrote" not in said


def test_a_kernel_and_an_initial_ram_disk(run, put, cache):
    kernel, initrd = put({"linux": b"a kernel", "initrd": b"an initial RAM disk"})
    ready = ("--login=none", "--ready=up", "--python=no", "--init=none")
    run("import", "bare", f"--kernel={kernel}", f"--initrd={initrd}", "--append=quiet", *ready)
    written = definition(cache, "bare")
    assert written["boot"] == {"firmware": "kernel", "append": "quiet"}
    assert "disk" not in written
    (folder,) = (cache / "images/bare").glob("*/")
    assert (folder / "vmlinuz").read_bytes() == b"a kernel"
    assert (folder / "initrd.img").read_bytes() == b"an initial RAM disk"
    record = json.loads((folder / "image.json").read_text(encoding="utf-8"))
    assert record["source"]["kernel_sha256"] == hashlib.sha256(b"a kernel").hexdigest()


def test_the_login_of_a_kernel_is_a_guess(run, put):
    disk, *_ = put(made("qcow2-v3"))
    kernel, initrd = put({"linux": b"a kernel", "initrd": b"an initial RAM disk"})
    for more, why in (
        ((), "login: key  (a guess: the system takes our key"),
        ((f"--initrd={initrd}",), "login: key  (a guess: its initial RAM disk takes our key"),
        ((disk,), "login: cloud-init"),
    ):
        assert why in run("import", "mine", f"--kernel={kernel}", *more, "--dry-run")


def test_guesses_fit_the_architecture(run, put):
    disk, *_ = put(made("qcow2-v3"))
    (kernel,) = put({"linux": b"a kernel"})
    for architecture, console, firmware in (
        ("x86_64", "ttyS0", "bios"),
        ("aarch64", "ttyAMA0", "uefi"),
        ("s390x", "ttysclp0", "bios"),
    ):
        asked = ("import", "mine", f"--architecture={architecture}", "--dry-run")
        assert f"append: console={console} root=/dev/vda rw" in run(*asked, f"--kernel={kernel}")
        assert f"firmware: {firmware}" in run(*asked, disk)


def test_a_harmful_file_leaves_nothing(run, put, cache):
    (file,) = put({"disk.vmdk": disks.descriptor('RW 1 FLAT "/etc/passwd" 0')})
    assert "names an extent with a path" in run("import", "evil", file, *NONE, status=69)
    assert not (cache / "imported").exists()
    assert list((cache / "images").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "place", "reading"),
    [("vdi", SourceFile, "digest"), ("vmdk-split-flat", describing, "pack")],
)
def test_a_file_that_changes_while_it_is_checked(
    name, place, reading, run, put, cache, monkeypatch
):
    files = put(made(name))
    read = getattr(place, reading)

    def then_write(*arguments):
        found = read(*arguments)
        os.utime(files[-1], ns=(1, 1))
        return found

    monkeypatch.setattr(place, reading, then_write)
    assert "was changed while it was imported" in run("import", "mine", *files, *NONE, status=69)
    assert not (cache / "imported").exists()


def test_a_file_that_the_host_cannot_read(run, cache, monkeypatch, tmp_path):
    said = run("import", "mine", "/proc/self/mem", *NONE, status=69)
    assert "mem cannot be read" in said
    assert "Remedy" in said
    monkeypatch.chdir(tmp_path)
    assert "[image] . is not a regular file, but a folder" in run(
        "import", "mine", ".", *NONE, status=69
    )
    assert list((cache / "images").iterdir()) == []


def test_a_name_that_is_taken_and_a_remedy_that_helps(run, put, cache, tmp_path, monkeypatch):
    (file,) = put(made("qcow2-v3"))
    folder = tmp_path / "images"
    run("import", "bar", file, "--into", folder, *NONE)
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "other"))
    for more in (["--into", folder], ["--into", folder, "--dry-run"]):
        said = run("import", "bar", file, *more, *NONE, status=2)
        assert f"remove it: rm -r {folder / 'bar'}" in said
        assert "images rm" not in said
    for name, where in (("tiny", []), ("bar", ["--image-path", folder])):
        said = run("import", name, file, *where, *NONE, "--dry-run", status=2)
        assert said.splitlines()[-1] == "Remedy: choose another name"
    run("import", "foo", file, *NONE)
    said = run("import", "foo", file, *NONE, "--dry-run", status=2)
    assert said.endswith("remove it first: vmsandbox images rm foo\n")
    run("rm", "foo")
    run("import", "foo", file, *NONE, "--dry-run")


def test_a_project_means_its_own_image_and_not_an_imported_one(run, put, cache, tmp_path):
    (file,) = put(made("qcow2-v3"))
    run("import", "foo", file, *NONE)
    write(tmp_path / "images/foo", toml(DISK))
    listed = json.loads(run("list", "--json", "--image-path", tmp_path / "images"))
    (found,) = [image for image in listed["images"] if image["name"] == "foo"]
    assert found["description"] == DISK["description"]
    run("rm", "foo", "--image-path", tmp_path / "images")
    assert not (cache / "imported/foo").exists()
    assert (tmp_path / "images/foo/image.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("UPPER", "x"), "is not a name for an image"),
        (("../up", "x"), "is not a name for an image"),
        (("tiny", "x"), "there is an image 'tiny' already"),
        (("mine",), "no file is given"),
        (("mine", "https://example.org/x"), "https://example.org/x is no file of this machine"),
        (("mine", "disk.qcow2", "--login=key"), "--login=key needs --kernel"),
        (("mine", "disk.qcow2", "--append=quiet"), "--append needs --kernel"),
        (("mine", "disk.qcow2", "--initrd=disk.qcow2"), "--initrd needs --kernel"),
        (("mine", "--kernel=linux", "--firmware=bios"), "cannot be used with --firmware=bios"),
        (("mine", "--kernel=initrd", *NONE), "--kernel=initrd is no kernel, but an archive"),
        (("mine", "--kernel=linux", "--initrd=linux", *NONE), "--initrd=linux is a kernel"),
        (("mine", "disk.qcow2", "--login=password"), "login.password"),
        (("mine", "disk.qcow2", "--python=three"), "system.python"),
        (("mine", "disk.qcow2", "--firmware=kernel"), "--firmware=kernel needs --kernel"),
        (("mine", "disk.qcow2", "disk.qcow2", "--memory=lots"), "boot.memory_min"),
    ],
)
def test_wrong_usage(arguments, why, run, put, cache, monkeypatch, tmp_path):
    put(made("qcow2-v3") | {"linux": bytes(0x202) + b"HdrS", "initrd": b"070701"})
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--dry-run",)):
        said = run("import", *arguments, *more, status=2)
        assert why in said
        assert "image.toml:" not in said
    assert list(cache.glob("imported/*")) == []


def test_a_definition_can_go_into_a_folder_of_the_project(run, put, cache, tmp_path):
    (file,) = put(made("vdi"))
    folder = tmp_path / "images"
    run("import", "mine", file, "--into", folder, *NONE)
    assert (folder / "mine/image.toml").exists()
    assert [path.name for path in folder.iterdir()] == ["mine"]
    run("rm", "mine", "--image-path", folder)
    assert (folder / "mine/image.toml").exists()  # it is the user's


def test_fetch(run, put, cache, tmp_path):
    (file,) = put(made("qcow2-v3"))
    run("import", "mine", file, *NONE)
    run("rm", "mine")
    run("import", "mine", file, *NONE, "--dry-run")
    folder = tmp_path / "images"
    run("import", "mine", file, "--into", folder, *NONE)
    run("rm", "mine", "--image-path", folder)
    assert "is built" in run("fetch", "mine", "--image-path", folder)
    file.write_bytes(file.read_bytes() + b"x")
    said = run("fetch", "mine", "--force", "--image-path", folder, status=69)
    assert "does not have its digest" in said
    assert "no definition with a [source]" in run("fetch", "tiny", status=2)


def test_what_was_downloaded_goes_with_the_last_image_that_needs_it(run, cache, tmp_path):
    disk = disks.image("qcow2-v3")
    digest = hashlib.sha256(disk).hexdigest()
    pages = {"/disk": disk, "/SHA256SUMS": f"{digest}  disk\n".encode()}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(pages[self.path])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        place = f"http://127.0.0.1:{server.server_port}"
        for name, key, architecture in (
            ("one", f'sha256 = "{digest}"', native_architecture()),
            ("two", f'checksums = "{place}/SHA256SUMS"', "i686"),
        ):
            (tmp_path / "images" / name).mkdir(parents=True)
            (tmp_path / "images" / name / "image.toml").write_text(
                f'schema = 1\ndescription = "x"\narchitecture = "{architecture}"\n'
                f'[source]\nurl = "{place}/disk"\n{key}\nformat = "qcow2"\n[boot]\nfirmware = "bios"\n'
                '[disk]\nsize = "3MiB"\n[system]\npython = false\ninit = "none"\n'
                '[login]\nmethod = "none"\nready = "up"\n'
            )
        where = ("--image-path", tmp_path / "images")
        run("fetch", "one", "two", *where)
        server.shutdown()
    assert disk_of(cache, "two") == disks.content()
    kept = [path.parent.name for path in cache.glob("downloads/*/data")]
    assert kept == [f"sha256-{digest[:40]}"]
    run("build", "one", "--force", "--offline", *where)
    for name, left in (("one", 1), ("two", 0)):
        run("rm", name, *where)
        (tmp_path / "images" / name / "image.toml").unlink()
        assert len(list(cache.glob("downloads/*/data"))) == left


def test_a_definition_stays_if_its_image_cannot_be_made(run, put, cache, monkeypatch):
    (file,) = put(made("qcow2-v3"))
    monkeypatch.setattr("pytest_vmsandbox.catalogue.importing.jail._CELL", "/nowhere")
    said = run("import", "mine", file, *NONE, status=69)
    assert "The definition stays" in said
    assert (cache / "imported/mine/image.toml").exists()
