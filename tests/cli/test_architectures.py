"""Images for several architectures in the commands, on a machine with a faked name; no guest is started."""

import json
import platform

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.catalogue import catalogue as catalogue_module
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.lock import Lock
from pytest_vmsandbox.cli import lock as lock_commands
from pytest_vmsandbox.cli.project import Project
from pytest_vmsandbox.core.paths import LOCK_FILE
from support import images

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f"
RECIPE = f"""\
#!/bin/sh
set -eu
echo "== for $VMSANDBOX_DEBIAN_ARCHITECTURE"
echo kernel >$VMSANDBOX_OUT/vmlinuz
echo initrd >$VMSANDBOX_OUT/initrd.img
echo {KEY} >$VMSANDBOX_OUT/host_key.pub
"""
SEVERAL = images.toml(description="A cake").replace(
    'architecture = "x86_64"', 'architectures = ["x86_64", "aarch64", "riscv64"]'
)


class Machine:
    """A machine with a cache and a project, where 'vmsandbox images' can be run."""

    def __init__(self, path, monkeypatch):
        self.path, self._monkeypatch = path, monkeypatch
        self.file = path / LOCK_FILE
        self.is_called("x86_64")

    def is_called(self, name):
        """Fake the name of its architecture."""
        self._monkeypatch.setattr(platform, "machine", lambda: name)

    def run(self, *arguments, status=0):
        result = CliRunner().invoke(cli.application, ["images", *arguments])
        assert result.exit_code == status, (result.output, result.exception)
        return result.output

    def listed(self, *arguments):
        """Name and state of each image in the list."""
        lines = [line.split() for line in self.run("list", *arguments).splitlines()]
        states = ("built", "stale", "missing", "other")
        return {words[0]: words[1] for words in lines if words[1] in states}

    def keep(self, *names):
        for name in names:
            images.keep(self.path / "cache", Catalogue([self.path / "images"]).get(name))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VMSANDBOX_IMAGE_PATH", str(tmp_path / "images"))
    monkeypatch.setattr(catalogue_module, "own_folders", list)
    monkeypatch.chdir(tmp_path)
    for name in ("cake-1", "cake-2"):
        images.define(tmp_path / "images" / name, SEVERAL, RECIPE)
    known = Project(rootdir=tmp_path, images=("cake-1",), image_path=(tmp_path / "images",))
    for module in (lock_commands, cli.project):
        monkeypatch.setattr(module, "ask", lambda _where, _say=None: known)
    return Machine(tmp_path, monkeypatch)


def test_the_list_has_this_machines_images_and_what_is_built(machine):
    machine.keep("cake-2", "cake-2_riscv64")
    assert machine.listed() == {"cake-1": "missing", "cake-2": "built", "cake-2_riscv64": "built"}
    last = machine.run("list").splitlines()[-1]
    assert last.startswith("3 more images are for other architectures: vmsandbox images list --all")


def test_the_list_of_more(machine):
    assert [*machine.listed("--all")] == [
        *("cake-1", "cake-1_arm64", "cake-1_riscv64", "cake-2", "cake-2_arm64", "cake-2_riscv64"),
    ]
    assert [*machine.listed("*_arm64")] == ["cake-1_arm64", "cake-2_arm64"]
    assert [*machine.listed("cake-1_amd64", "cake-2_*", "!*_riscv64")] == [
        *("cake-1", "cake-2", "cake-2_arm64"),
    ]
    assert [*machine.listed("cake-1*")] == ["cake-1"]
    assert "2 more images are for other architectures" in machine.run("list", "cake-1*")
    assert [*machine.listed("--all", "cake-1*")] == ["cake-1", "cake-1_arm64", "cake-1_riscv64"]
    for arguments in (["--all"], ["*_arm64"], ["cake-1"], ["--all", "cake-1*"]):
        assert "more images" not in machine.run("list", *arguments)
    assert "did you mean 'cake-1_arm64'?" in machine.run("list", "cake-1-arm64", status=2)


def test_the_list_says_what_an_image_is_for(machine):
    lines = machine.run("list", "cake-1_*").splitlines()
    assert [line.partition("A cake")[2] for line in lines] == [
        *(" (host-driven)", ", for arm64 (host-driven)", ", for riscv64 (host-driven)")
    ]
    listed = json.loads(machine.run("list", "--json", "cake-1_*"))["images"]
    assert [image["debian_architecture"] for image in listed] == ["amd64", "arm64", "riscv64"]


def test_the_list_for_programs_has_all(machine):
    found = json.loads(machine.run("list", "--json"))["images"]
    assert {image["name"]: image["architecture"] for image in found} == {
        "cake-1": "x86_64",
        "cake-1_arm64": "aarch64",
        "cake-1_riscv64": "riscv64",
        "cake-2": "x86_64",
        "cake-2_arm64": "aarch64",
        "cake-2_riscv64": "riscv64",
    }
    found = json.loads(machine.run("list", "--json", "cake-2*"))["images"]
    assert [image["name"] for image in found] == ["cake-2"]


def test_build_makes_what_is_named_and_no_more(machine):
    said = machine.run("build", "all")
    assert "cake-1 is built" in said
    assert said.count("  for amd64\n") == 2
    said = machine.run("build", "cake-*_arm64", "cake-1_amd64")
    assert said.startswith("cake-1 is built\nbuilding cake-1_arm64: A cake\n  for arm64\n")
    assert said.count("  for arm64\n") == 2
    assert [*machine.listed()] == ["cake-1", "cake-1_arm64", "cake-2", "cake-2_arm64"]


def test_on_a_machine_with_the_faked_name_arm64_the_short_name_is_arm64(machine):
    machine.is_called("aarch64")
    said = machine.run("build", "cake-1")
    assert "  for arm64\n" in said
    found = json.loads(machine.run("list", "--json", "cake-1", "cake-1_amd64"))["images"]
    assert [(image["name"], image["state"]) for image in found] == [
        ("cake-1", "built"),
        ("cake-1_amd64", "missing"),
    ]


def test_rm_removes_what_is_named_and_no_more(machine):
    machine.keep("cake-1", "cake-2", "cake-1_arm64", "cake-2_arm64", "cake-2_riscv64")
    told = machine.run("rm", "cake-*").splitlines()[-1]
    assert told == (
        "left, because a glob without _ is for this machine only: cake-1_arm64, cake-2_arm64, cake-2_riscv64"
    )
    assert [name for name, state in machine.listed().items() if state == "built"] == [
        *("cake-1_arm64", "cake-2_arm64", "cake-2_riscv64"),
    ]
    machine.keep("cake-1")
    assert "left" not in machine.run("rm", "cake-1_amd64", "cake-*_arm64")
    assert [name for name, state in machine.listed().items() if state == "built"] == [
        "cake-2_riscv64",
    ]


def test_rm_knows_what_has_no_definition_any_more(machine):
    machine.keep("cake-1", "cake-1_arm64")
    (machine.path / "images" / "cake-1" / "image.toml").unlink()
    assert machine.listed() | {"cake-1": "other", "cake-1_arm64": "other"} == machine.listed()
    machine.run("rm", "cake-1*")
    assert "cake-1_arm64" in machine.listed()
    machine.run("rm", "cake-1_arm64")
    assert [*machine.listed()] == ["cake-2"]


def test_machines_that_share_a_cache(machine):
    """What one of them builds leaves what the other one has under the same name."""
    machine.run("build", "cake-1")
    machine.is_called("aarch64")
    assert machine.listed()["cake-1"] == "missing"
    machine.run("build", "cake-1")
    assert machine.listed()["cake-1"] == "built"
    machine.is_called("x86_64")
    assert machine.listed()["cake-1"] == "built"
    recipe = machine.path / "images" / "cake-1" / "build"
    recipe.write_text(f"{RECIPE}# another one\n")
    assert machine.listed()["cake-1"] == "stale"
    machine.run("build", "cake-1")
    assert len([*(machine.path / "cache/images/cake-1").iterdir()]) == 2  # with the other machine's


def test_a_lock_of_another_machine(machine):
    """An entry that only another machine needs is neither an error nor built here."""
    machine.is_called("aarch64")
    machine.keep("cake-1")
    machine.run("lock")
    machine.is_called("x86_64")
    assert "left out, because they are for other architectures" in machine.run("verify", "--json")
    machine.run("rm", "cake-1_arm64")
    machine.keep("cake-1")
    machine.run("lock")
    left_out = "and not built here: cake-1_arm64\n"
    assert machine.run("verify").endswith(f"{left_out}cake-1: intact, and as it is locked\n")
    assert left_out in machine.run("update", "--dry-run")
    before = machine.file.read_text()
    assert "cake-1_arm64: the image 'cake-1_arm64' is not built" in machine.run(
        "verify", "cake-1_arm64", status=1
    )
    assert machine.file.read_text() == before
    assert {*Lock.read(machine.file).images} == {"cake-1", "cake-1_arm64"}
