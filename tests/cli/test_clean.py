"""`vmsandbox clean`, and the templates in `vmsandbox images`; no guest is started."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.cache.files import locked
from pytest_vmsandbox.cache.store import ENVIRONMENTS, Entry, Store
from pytest_vmsandbox.guests.templates import TemplateStore
from pytest_vmsandbox.machine import orphans
from support import made_templates

NOTHING = "there is nothing to clean\n"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def runtime(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def invoke(cache, runtime, monkeypatch):
    """Run the command in this process, with folders of its own."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(cache))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(runtime))
    monkeypatch.setattr(orphans, "end_ownerless", list)
    told: dict[str, Any] = (
        {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    )
    return lambda *arguments: CliRunner(**told).invoke(cli.application, arguments)


def templates(cache):
    return [it.image for it in TemplateStore(cache).all()]


class TestImages:
    def test_the_list_has_templates_by_image(self, invoke, cache):
        made_templates.add(cache, "tiny", 1)
        made_templates.add(cache, "tiny", 2)
        made_templates.add(cache, "gone")
        lines = [line.split() for line in invoke("images", "list").stdout.splitlines()]
        assert [(it[0], it[3]) for it in lines if it[1] == "saved"] == [
            ("gone", "1"),
            ("tiny", "2"),
        ]
        content = json.loads(invoke("images", "list", "--json").stdout)
        gone, tiny = content["templates"]
        assert (gone["image"], gone["count"]) == ("gone", 1)
        assert (tiny["image"], tiny["count"]) == ("tiny", 2)
        assert tiny["size_bytes"] == 2 * gone["size_bytes"] > 2 * 8192

    def test_the_list_of_some_has_their_templates(self, invoke, cache):
        made_templates.add(cache, "tiny")
        assert "saved" not in invoke("images", "list", "debian-*").stdout
        assert json.loads(invoke("images", "list", "--json", "debian-13").stdout)["templates"] == []
        [told] = json.loads(invoke("images", "list", "--json", "ti*").stdout)["templates"]
        assert told["image"] == "tiny"

    def test_the_columns_of_both_are_the_same(self, invoke, cache):
        made_templates.add(cache, "one-that-has-a-name-longer-than-others")
        lines = invoke("images", "list").stdout.splitlines()
        image, template = (
            next(line for line in lines if line.split()[1] == state)
            for state in ("missing", "saved")
        )
        assert image.index("missing") == template.index("saved")

    def test_rm_takes_templates_along(self, invoke, cache):
        for number in range(2):
            made_templates.add(cache, "tiny", number)
        made_templates.add(cache, "debian-13")
        result = invoke("images", "rm", "tiny")
        assert result.exit_code == 0
        assert "removed tiny and 2 templates: " in result.stdout
        assert templates(cache) == ["debian-13"]

    def test_rm_knows_the_name_of_an_image_that_only_templates_are_left_of(self, invoke, cache):
        made_templates.add(cache, "gone")
        assert invoke("images", "rm", "go*").exit_code == 0
        assert templates(cache) == []

    def test_rm_leaves_those_in_use(self, invoke, cache):
        template = made_templates.add(cache, "tiny")
        with TemplateStore(cache).hold(template.folder):
            assert invoke("images", "rm", "tiny").exit_code == 0
            assert templates(cache) == ["tiny"]


class TestClean:
    def test_nothing_to_do(self, invoke, cache):
        assert invoke("clean").stdout == NOTHING
        assert not cache.exists()  # looking changes nothing

    def test_folders_of_dead_runs(self, invoke, runtime):
        dead, alive = runtime / "1-0123abcd", runtime / "2-0123abcd"
        for folder in (dead, alive):
            folder.mkdir()
            (folder / ".lock").touch()
        with (alive / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert invoke("clean").stdout == "removed: 1 folder of killed runs\n"
            assert alive.exists()
            assert not dead.exists()
            assert invoke("clean").stdout == NOTHING

    def test_what_a_killed_run_or_build_left_in_the_cache(self, invoke, cache):
        for name in ("templates/.new-0123", "templates/.gone-4567", "images/.new-tiny"):
            (cache / name).mkdir(parents=True)
            (cache / name / "part").write_bytes(b"x" * 8192)
        kept = made_templates.add(cache, "tiny")
        stale = cache / "templates" / "89ab.lock"
        stale.touch()
        output = invoke("clean").stdout
        assert "incomplete files in the cache" in output
        left = {it.name for it in (cache / "templates").iterdir()}
        assert left == {kept.folder.name, f"{kept.folder.name}.lock"}
        assert not (cache / "images" / "tiny").exists()
        assert invoke("clean").stdout == NOTHING

    def test_half_made_environments_of_tests_in_guests(self, invoke, cache):
        environments = cache / "environments"
        for name in (".new-1", ".gone-1", "whole"):
            (environments / name).mkdir(parents=True)
            (environments / name / "part").write_bytes(b"x" * 8192)
        with locked(environments / "1.lock"):
            assert "incomplete files in the cache; freed 8KiB" in invoke("clean").stdout
        assert "incomplete files in the cache; freed 8KiB" in invoke("clean").stdout
        assert [it.name for it in environments.iterdir() if it.is_dir()] == ["whole"]
        assert invoke("clean").stdout == NOTHING

    def test_what_is_being_made_stays(self, invoke, cache):
        def fill(folder, _lock):
            assert invoke("clean").stdout == NOTHING
            assert folder.exists()
            return {"image": "tiny", "name": "tiny", "layers": [], "disk": "", "facts": {}}

        TemplateStore(cache).make("c0ffee", fill, on_busy=lambda: None)

    def test_what_older_versions_have_made(self, invoke, cache):
        """It is removed and told, once; what they have built stays."""
        template, environment, image = (
            cache / name
            for name in (f"templates/{'0' * 32}", f"environments/{'0' * 64}", "images/t/1")
        )
        left = [cache / name for name in (f"templates/.incoming-{'1' * 32}", "images/tiny/.new-8")]
        for folder in (template, environment, image, *left):
            folder.mkdir(parents=True)
        (template / "template.json").write_text("{}")
        (environment / "digests.json").write_bytes(b"x" * 4096)
        (image / "image.json").write_text("{}")
        (cache / "images" / "tiny.lock").touch()
        output = invoke("clean").stdout
        assert " of templates and environments of an older version" in output
        assert [folder.exists() for folder in (template, environment, image)] == [
            False,
            False,
            True,
        ]
        assert not any(folder.exists() for folder in left)
        assert invoke("clean").stdout == NOTHING

    def test_environments_only_when_asked_to(self, invoke, cache):
        environments = Store(cache, ENVIRONMENTS, Entry)
        for name in ("1", "2"):
            environments.make(name, lambda *_: {}, on_busy=lambda: None)
        assert invoke("clean", "--templates").stdout == NOTHING
        with environments.hold(environments.all()[0].folder):
            output = invoke("clean", "--environments").stdout
        assert "removed: 1 environment; " in output
        assert "kept: 1 environment in use" in output
        assert len(environments.all()) == 1

    def test_templates_only_when_asked_to(self, invoke, cache):
        made_templates.add(cache, "tiny", 1)
        used = made_templates.add(cache, "tiny", 2)
        broken = made_templates.add(cache, "tiny", 3)
        (broken.folder / "template.json").write_text("{")
        assert invoke("clean").stdout == NOTHING
        with TemplateStore(cache).hold(used.folder):
            output = invoke("clean", "--templates").stdout
        assert "removed: 2 templates; " in output
        assert "freed" in output
        assert "kept: 1 template in use" in output
        assert [it.folder for it in TemplateStore(cache).all()] == [used.folder]
        assert not broken.folder.exists()

    def test_a_runtime_folder_that_others_can_write_to(self, invoke, runtime):
        runtime.chmod(0o777)
        assert invoke("clean").exit_code == 2


class TestLaunchers:
    @pytest.fixture
    def launcher(self, tmp_path):
        """A process that looks like the launcher of a run."""
        program = tmp_path.joinpath(*orphans._LAUNCHER.parts)
        program.parent.mkdir(parents=True)
        program.write_text("import sys\nprint(flush=True)\nsys.stdin.read()\n")
        folder = tmp_path / "1-0123abcd"
        folder.mkdir()
        (folder / ".lock").touch()
        argv = [sys.executable, "-I", "-S", str(program), "3", "1", str(folder)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"\n"  # before, it is not yet that program
            yield process, folder
            process.kill()

    @pytest.fixture
    def proc(self, tmp_path, launcher):
        """No other process is looked at."""
        folder = tmp_path / "proc"
        folder.mkdir()
        (folder / str(launcher[0].pid)).symlink_to(f"/proc/{launcher[0].pid}")
        (folder / "1").symlink_to("/proc/1")
        return folder

    def test_one_whose_run_is_gone_is_ended(self, launcher, proc):
        process, _ = launcher
        assert orphans.end_ownerless(proc) == [process.pid]
        assert process.wait(10) == -9

    def test_one_whose_run_lives_is_not(self, launcher, proc):
        process, folder = launcher
        with (Path(folder) / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert orphans.end_ownerless(proc) == []
        assert process.poll() is None
