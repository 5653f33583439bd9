"""`vmsandbox kept`, and what other commands say of kept guests; no guest is started."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import shlex
import stat
import tarfile
from inspect import signature
from typing import Any

import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.cli import kept as command
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests import exported
from pytest_vmsandbox.guests.kept import KeptStore
from pytest_vmsandbox.machine import orphans
from support import made_kept, made_templates

ODD = "tests/test a.py::TestX::test_é[a b-'\"$x`-tiny]"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def invoke(cache, tmp_path, monkeypatch):
    """Run the command in this process, with folders of its own."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("VMSANDBOX_CACHE", str(cache))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(runtime))
    monkeypatch.setattr(orphans, "end_ownerless", list)
    monkeypatch.chdir(tmp_path)
    told: dict[str, Any] = (
        {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    )
    return lambda *arguments: CliRunner(**told).invoke(cli.application, arguments)


def ids(cache):
    return {it.moment.nodeid for it in KeptStore(cache).all()}


class TestList:
    def test_there_is_none(self, invoke, cache):
        assert "no guest is kept" in invoke("kept", "list").stdout
        assert json.loads(invoke("kept", "list", "--json").stdout) == {"schema": 1, "kept": []}
        assert not cache.exists()

    def test_a_test_and_its_guests(self, invoke, cache):
        made_kept.add(cache, guest="tiny-1")
        made_kept.add(cache, guest="deb-1", image="debian-13", number=2, saved_at=1_790_000_001.0)
        made_kept.add(cache, ODD, saved_at=1.0, phase="setup", error="[boot] no answer")
        lines = invoke("kept", "list").stdout.splitlines()
        assert [line.partition("  ")[0] for line in lines if not line.startswith(" ")] == [
            ODD,
            "tests/test_x.py::test_y[tiny]",
        ]
        assert "setup: [boot] no answer" in lines[1]
        assert [line.split()[:2] for line in lines[3:]] == [
            ["tiny-1", "tiny"],
            ["deb-1", "debian-13"],
        ]
        assert "QEMU 7.2.22  assert 1 == 2" in lines[3]
        assert "KiB" in lines[3]

    def test_the_project_here_is_not_named(self, invoke, cache, tmp_path):
        made_kept.add(cache, "a.py::test", rootdir=os.fspath(tmp_path))
        made_kept.add(cache, "b.py::test")
        output = invoke("kept", "list").stdout
        assert f"({tmp_path})" not in output
        assert "b.py::test  (/home/you/project)" in output

    def test_json(self, invoke, cache):
        made_kept.add(cache, ODD, environment=("TOKEN",))
        content = json.loads(invoke("kept", "list", "--json").stdout)
        [it] = content["kept"]
        assert content["schema"] == 1
        assert (it["test"], it["guest"], it["image"], it["phase"]) == (
            ODD,
            "tiny-1",
            "tiny",
            "call",
        )
        assert (it["environment"], it["qemu"], it["error"]) == (
            ["TOKEN"],
            "7.2.22",
            "assert 1 == 2",
        )
        assert it["size_bytes"] > 8192

    def test_text_of_a_guest_does_no_harm(self, invoke, cache):
        made_kept.add(cache, error="\x1b[2J\x07red")
        assert "\x1b" not in invoke("kept", "list").stdout

    def test_one_that_cannot_be_read(self, invoke, cache):
        (made_kept.add(cache).folder / "kept.json").write_text("{")
        assert "1 kept guest cannot be read" in invoke("kept", "list").stdout
        assert invoke("kept", "rm", "--all").exit_code == 0
        assert KeptStore(cache).folders() == []


class TestRm:
    def test_of_a_file_a_folder_and_the_project(self, invoke, cache, tmp_path):
        here = {"rootdir": os.fspath(tmp_path)}
        for nodeid in (
            "a/x.py::t[tiny]",
            "a/x.py::C::u[tiny]",
            "a/xx.py::t[tiny]",
            "b/x.py::t[tiny]",
        ):
            made_kept.add(cache, nodeid, **here)
        made_kept.add(cache, "a/x.py::other[tiny]")
        assert "removed: 1 kept guest" in invoke("kept", "rm", "a/x.py::C").stdout
        assert "removed: 1 kept guest" in invoke("kept", "rm", "./a/x.py").stdout
        assert ids(cache) == {"a/xx.py::t[tiny]", "b/x.py::t[tiny]", "a/x.py::other[tiny]"}
        assert "removed: 1 kept guest" in invoke("kept", "rm", "a/").stdout
        assert "removed: 1 kept guest" in invoke("kept", "rm", ".").stdout
        assert ids(cache) == {"a/x.py::other[tiny]"}  # of another project
        assert invoke("kept", "rm", ".").exit_code == 2

    def test_one_guest_of_a_test(self, invoke, cache):
        made_kept.add(cache)
        made_kept.add(cache, number=2, guest="tiny-2")
        done = invoke("kept", "rm", "test_y", "--guest", "tiny-2")
        assert "removed: 1 kept guest" in done.stdout
        assert [it.guest for it in KeptStore(cache).all()] == ["tiny-1"]
        assert invoke("kept", "rm", "test_y", "--guest", "tiny-2").exit_code == 2

    def test_of_one_test(self, invoke, cache):
        made_kept.add(cache)
        made_kept.add(cache, number=2, guest="tiny-2")
        made_kept.add(cache, ODD)
        assert "removed: 2 kept guests; freed " in invoke("kept", "rm", "test_x.py::test_y").stdout
        assert ids(cache) == {ODD}
        assert "removed: 1 kept guest; " in invoke("kept", "rm", ODD).stdout

    def test_of_all(self, invoke, cache):
        made_kept.add(cache)
        made_kept.add(cache, ODD)
        assert "removed: 2 kept guests; " in invoke("kept", "rm", "--all").stdout
        assert ids(cache) == set()
        assert list(KeptStore(cache).root.iterdir()) == []

    def test_one_in_use_stays(self, invoke, cache):
        it = made_kept.add(cache)
        made_kept.add(cache, ODD)
        with KeptStore(cache).hold(it.folder):
            done = invoke("kept", "rm", "--all")
        assert done.exit_code == 69
        assert "removed: 1 kept guest; " in done.stdout
        assert (
            "1 kept guest in use, and not removed\ntests/test_x.py::test_y[tiny]\n" in done.stderr
        )
        assert ids(cache) == {"tests/test_x.py::test_y[tiny]"}

    @pytest.mark.parametrize("arguments", [(), ("--all", "x.py::test")])
    def test_wrong_usage(self, invoke, arguments):
        assert invoke("kept", "rm", *arguments).exit_code == 2

    def test_one_that_is_not_there(self, invoke, cache):
        made_kept.add(cache)
        done = invoke("kept", "rm", "test_z")
        assert (done.exit_code, len(ids(cache))) == (2, 1)
        assert "tests/test_x.py::test_y[tiny]" in done.stderr


class TestChoice:
    def test_several_guests_of_a_test(self, invoke, cache, tmp_path):
        made_kept.add(cache, ODD)
        made_kept.add(cache, ODD, number=2, guest="tiny-2")
        for chosen, why in [((), "2 guests of"), (("--guest", "tiny-3"), "no guest 'tiny-3' of")]:
            done = invoke("kept", "export", ODD, str(tmp_path / "file"), *chosen)
            assert done.exit_code == 2
            assert why in done.stderr
            assert "--guest tiny-2" in done.stderr
        done = invoke("kept", "export", ODD, str(tmp_path / "file"), "--guest", "tiny-2")
        assert done.exit_code == 0

    def test_the_project_of_the_current_folder_comes_first(
        self, invoke, cache, tmp_path, monkeypatch
    ):
        made_kept.add(cache, rootdir=os.fspath(tmp_path), guest="own")
        made_kept.add(cache)
        (tmp_path / "tests").mkdir()
        monkeypatch.chdir(tmp_path / "tests")
        store = KeptStore(cache)
        assert command.choose(store, "test_x.py::test_y", None).guest == "own"
        monkeypatch.chdir("/")
        with pytest.raises(ConfigError, match="2 tests"):
            command.choose(store, "test_x.py::test_y", None)

    def test_the_line_can_be_pasted(self, cache):
        line = command.line(made_kept.add(cache, ODD), several=True)
        assert shlex.split(line) == ["vmsandbox", "enter", ODD, "--guest", "tiny-1"]


class TestExport:
    def test_there_and_back(self, invoke, cache, tmp_path, monkeypatch):
        group = {"id": "a1", "guests": ["tiny-1", "tiny-2"], "networks": []}
        before = made_kept.add(cache, ODD, environment=("TOKEN", "PASSWORD"), group=group)
        file = tmp_path / "file"
        done = invoke("kept", "export", ODD, str(file))
        assert done.exit_code == 0
        assert "the memory and the disks of tiny-1, and the SSH key" in done.stdout
        assert "TOKEN, PASSWORD" in done.stdout
        assert "Not in it: tiny-2. Export them, too" in done.stdout
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert [it.name for it in tmp_path.iterdir() if it.name.startswith(".")] == []

        monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "other"))
        done = invoke("kept", "import", str(file), "--trust")
        assert done.exit_code == 0, done.stderr
        assert shlex.quote(ODD) in done.stdout
        [after] = KeptStore(tmp_path / "other").all()
        assert (after.record, after.damage()) == (before.record, "")
        assert after.key == before.key
        files = [it for it in after.folder.rglob("*") if it.is_file()]
        assert {stat.S_IMODE(it.stat().st_mode) for it in files} == {0o600}

    def test_it_replaces_nothing(self, invoke, cache, tmp_path):
        made_kept.add(cache)
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("nowhere")
        for name in ("file", "link"):
            done = invoke("kept", "export", "test_y", str(tmp_path / name))
            assert (done.exit_code, "already" in done.stderr) == (2, True)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_folder_that_is_not_there(self, invoke, cache, tmp_path):
        made_kept.add(cache)
        assert invoke("kept", "export", "test_y", str(tmp_path / "no" / "file")).exit_code == 2

    def test_nothing_is_left_of_one_that_fails(self, invoke, cache, tmp_path):
        (made_kept.add(cache).folder / "state").unlink()
        assert invoke("kept", "export", "test_y", str(tmp_path / "file")).exit_code == 69
        assert [it for it in tmp_path.iterdir() if "file" in it.name] == []

    def test_disks_only(self, cache):
        it = made_kept.add(cache, has_memory=False)
        assert list(command.secrets_of(it)) == [
            "It has the disks of tiny-1, and the SSH key that opens it"
        ]


class TestImport:
    @pytest.fixture
    def file(self, invoke, cache, tmp_path):
        made_kept.add(cache)
        assert invoke("kept", "export", "test_y", str(tmp_path / "file")).exit_code == 0
        invoke("kept", "rm", "--all")
        return tmp_path / "file"

    def test_only_of_those_whom_one_trusts(self, invoke, cache, file):
        done = invoke("kept", "import", str(file))
        assert done.exit_code == 2
        assert "--trust" in done.stderr
        assert "tiny-1 of tests/test_x.py::test_y[tiny]" in done.stderr
        assert ids(cache) == set()

    def test_no_such_file(self, invoke, tmp_path):
        done = invoke("kept", "import", str(tmp_path / "nix.kept"), "--trust")
        assert done.exit_code == 2
        assert f"{tmp_path}/nix.kept cannot be read: it does not exist" in done.stderr
        assert "damaged" not in done.stderr

    def test_something_else(self, invoke, tmp_path):
        (tmp_path / "test_x.py").write_text("import os\n" * 99)
        done = invoke("kept", "import", str(tmp_path / "test_x.py"), "--trust")
        assert done.exit_code == 2
        assert f"{tmp_path}/test_x.py is no kept guest, or it is damaged: " in done.stderr
        assert done.stderr.count("damaged") == 1, done.stderr

    def test_not_twice(self, invoke, cache, file):
        assert invoke("kept", "import", str(file), "--trust").exit_code == 0
        done = invoke("kept", "import", str(file), "--trust")
        assert done.exit_code == 2
        assert "vmsandbox kept rm" in done.stderr

    def test_what_is_cut_short_leaves_nothing(self, invoke, cache, file):
        file.write_bytes(file.read_bytes()[:-9])
        assert invoke("kept", "import", str(file), "--trust").exit_code == 2
        assert [it.name for it in (cache / "kept").iterdir() if not it.name.endswith(".lock")] == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"layers": [["../../../etc/passwd"]]}, "names '../../../etc/passwd'"),
            ({"layers": [["/etc/passwd"]]}, "names '/etc/passwd'"),
            ({"tpm": ["../../x"]}, "names 'tpm/../../x'"),
            ({"plugged": [{"layers": [], "base": "/dev/sda"}]}, "names '/dev/sda'"),
            ({"plugged": 5}, "cannot be read"),
            ({"moment": {}}, "cannot be read"),
            ({"moment.nodeid": ["a"]}, "moment.nodeid"),
            ({"moment.nodeid": "a.py::t\nINJECTED"}, "moment.nodeid"),
            ({"moment.nodeid": "x" * 3_000_000}, "moment.nodeid"),
            ({"moment.number": "1"}, "moment.number"),
            ({"moment.number": 10**400}, "moment.number"),
            ({"moment.rootdir": None}, "moment.rootdir"),
            ({"moment.phase": "\x1b[31m"}, "moment.phase"),
            ({"moment.environment": "ABC"}, "moment.environment"),
            ({"guest": "../../x"}, "guest"),
            ({"guest": "a,file=/etc/passwd"}, "guest"),
            ({"image": "\x1b[31m"}, "image"),
            ({"helper": 5}, "helper"),
            ({"lead": "x"}, "lead"),
            ({"more_args": ["-name", 5]}, "more_args"),
            ({"saved_at": 1e300}, "cannot be read"),
            ({"schema": 99}, "another version"),
        ],
        ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
    )
    def test_records_of_strangers(self, invoke, cache, file, change, said):
        with tarfile.open(file) as archive:
            members = [(member, archive.extractfile(member).read()) for member in archive]
        record = json.loads(members[0][1])
        for path, value in change.items():
            *parents, name = path.split(".")
            place = record[parents[0]] if parents else record
            place[name] = value
        members[0] = (members[0][0], json.dumps(record).encode())
        members[0][0].size = len(members[0][1])
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for member, data in members:
                archive.addfile(member, io.BytesIO(data))
        file.write_bytes(gzip.compress(out.getvalue()))
        done = invoke("kept", "import", str(file), "--trust")
        assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
        assert ids(cache) == set()

    def test_further_arguments_are_told(self, invoke, cache, tmp_path):
        it = made_kept.add(cache)
        record = {**it.record, "more_args": ["-device", "evil thing"]}
        it = dataclasses.replace(it, record=record)
        with (tmp_path / "file").open("wb") as out:
            exported.write(it, out)
        invoke("kept", "rm", "--all")
        for options in ((), ("--trust",)):
            done = invoke("kept", "import", str(tmp_path / "file"), *options)
            assert "which a hook has added: -device 'evil thing'" in done.stderr + done.stdout

    def test_in_the_place_of_what_cannot_be_read(self, invoke, cache, file):
        assert invoke("kept", "import", str(file), "--trust").exit_code == 0
        [it] = KeptStore(cache).all()
        (it.folder / "kept.json").write_text("{")
        assert invoke("kept", "import", str(file), "--trust").exit_code == 0
        assert KeptStore(cache).all() == [it]


class TestOthers:
    def test_images_list(self, invoke, cache):
        made_kept.add(cache)
        made_kept.add(cache, ODD)
        lines = [line.split() for line in invoke("images", "list").stdout.splitlines()]
        assert [(it[0], it[3:]) for it in lines if it[1] == "kept"] == [
            ("tiny", ["2", "guests", "of", "tests"])
        ]
        [it] = json.loads(invoke("images", "list", "--json").stdout)["kept"]
        assert (it["image"], it["count"], it["size_bytes"] > 2 * 8192) == ("tiny", 2, True)
        assert json.loads(invoke("images", "list", "--json", "debian-13").stdout)["kept"] == []

    def test_images_rm_leaves_them(self, invoke, cache):
        made_kept.add(cache)
        made_templates.add(cache, "tiny")
        output = invoke("images", "rm", "tiny").stdout
        assert "1 kept guest of tests" in output
        assert "vmsandbox kept" in output
        assert len(ids(cache)) == 1

    def test_clean_leaves_them(self, invoke, cache):
        made_kept.add(cache)
        output = invoke("clean", "--templates").stdout
        assert output.startswith("kept: 1 kept guest of tests (")
        assert "vmsandbox kept rm --all" in output
        assert "nothing to clean" not in output
        assert len(ids(cache)) == 1
