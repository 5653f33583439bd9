"""What all recipes share, `images/debian/lib.sh`: an archive that is just being updated, and the place of the tree."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.catalogue.own import own_folders

(TINY,) = [folder / "tiny" for folder in own_folders()]
# As a recipe runs: it is root, or calls itself so, and may mount.
UNSHARE = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]
STALE = (
    "E: Failed to fetch http://mirror.example/debian/dists/{}/main/binary-x/by-hash/SHA256/1f  {}"
)
SYNC = "File has unexpected size (1 != 2). Mirror sync in progress? [IP: ::1 80]"


@pytest.fixture
def archive(tmp_path):
    """An archive for amd64 and riscv64, whose mirror fails as often as it has answers."""
    programs = tmp_path / "programs"
    programs.mkdir()
    answers, calls = tmp_path / "answers", tmp_path / "calls"
    fakes = {
        "mmdebstrap": f"""
            echo "$@" >>{calls}
            [ -s {answers} ] || exit 0
            head -n1 {answers} | tr '|' '\\n' >&2
            sed -i 1d {answers}
            exit 1""",
        "dpkg": "echo amd64",
        "sleep": f'[ "$1" != 30 ] || exec /bin/sleep 60; echo "sleep $1" >>{calls}',
    }
    for name, content in fakes.items():
        (programs / name).write_text(f"#!/bin/sh\n{content}\n")
        (programs / name).chmod(0o755)

    def bootstrap(architecture, *failures, **environment):
        """Have a system made. Each failure is what the program for that says, with ``|`` for a new line."""
        answers.write_text("".join(f"{failure}\n" for failure in failures))
        calls.write_text("")
        (tmp_path / "out").mkdir(exist_ok=True)
        script = f". ../debian/lib.sh; ROOT={tmp_path}/root TMPDIR={tmp_path}; bootstrap trixie minbase apt"
        done = subprocess.run(
            ["sh", "-euc", script],
            cwd=TINY,
            env={
                **os.environ,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "VMSANDBOX_DEBIAN_ARCHITECTURE": architecture,
                "VMSANDBOX_OUT": str(tmp_path / "out"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        notes = tmp_path / "out" / "notes.txt"
        lines = calls.read_text().splitlines()
        return SimpleNamespace(
            status=done.returncode,
            output=done.stdout + done.stderr,
            runs=[line for line in lines if not line.startswith("sleep")],
            pauses=[line for line in lines if line.startswith("sleep")],
            notes=notes.read_text() if notes.exists() else "",
        )

    return bootstrap


class TestAnArchiveThatIsBeingUpdated:
    def test_it_is_tried_again(self, archive):
        done = archive("amd64", STALE.format("trixie-security", SYNC))
        assert done.status == 0
        assert len(done.pauses) == 1
        assert done.runs[0] == done.runs[1]
        assert not done.notes

    @pytest.mark.parametrize(
        "failure",
        [
            STALE.format("trixie-security", SYNC),
            STALE.format("trixie", "Hash Sum mismatch"),
            "Mirror sync in progress?",
        ],
    )
    def test_an_image_for_this_machine_is_never_made_without_updates(self, archive, failure):
        done = archive("amd64", *[failure] * 9)
        assert done.status == 1
        assert len({*done.runs}) == 1
        assert len(done.runs) == 3
        assert "Try again later" in done.output
        assert not done.notes

    def test_one_for_another_architecture_says_what_it_lacks(self, archive):
        failure = "|".join(STALE.format(f"trixie-{name}", SYNC) for name in ("security", "updates"))
        done = archive("riscv64", failure, failure)
        assert done.status == 0
        assert "trixie-security main" in done.runs[2]
        assert "trixie-updates main" in done.runs[2]
        assert done.notes.startswith("no updates from trixie-security trixie-updates: ")

    def test_only_what_does_not_match_is_left_out(self, archive):
        done = archive("riscv64", *[STALE.format("trixie-updates", SYNC)] * 2)
        assert done.status == 0
        assert "trixie-security main" not in done.runs[2]

    def test_no_system_can_be_made_without_its_own_suite(self, archive):
        failure = "|".join(STALE.format(name, SYNC) for name in ("trixie", "trixie-updates"))
        done = archive("riscv64", *[failure] * 9)
        assert done.status == 1
        assert "(trixie trixie-updates)" in done.output

    def test_other_failures_are_not_tried_again(self, archive):
        done = archive("amd64", "E: no route")
        assert done.status == 1
        assert len(done.runs) == 1

    def test_the_emulator_fails(self, archive):
        """Some versions of it crash on some machines, in a script of the C library."""
        crash = "qemu: uncaught target signal 11 (Segmentation fault) - core dumped"
        errors = f"I: begins|{crash}|dpkg: error processing package libc-bin|E: dpkg failed"
        said = archive("arm64", errors, VMSANDBOX_BINFMT=":qemu").output.splitlines()[-1]
        assert f"the emulator for single programs failed ({crash}): " in said
        assert "VMSANDBOX_NO_BINFMT=1" in said
        assert "VMSANDBOX_NO_BINFMT" not in archive("amd64", errors).output


class TestHowFarPackagesAre:
    """A long installation says now and then that it goes on."""

    LOG = """\
2026-11-29 14:45:01 install gcc-14-base:arm64 <none> 14.2.0-19
2026-11-29 14:45:01 status half-installed gcc-14-base:arm64 14.2.0-19
2026-11-29 14:45:01 status unpacked gcc-14-base:arm64 14.2.0-19
2026-11-29 14:45:02 install libc6:arm64 <none> 2.41-12
2026-11-29 14:45:02 status unpacked libc6:arm64 2.41-12
2026-11-29 14:45:03 configure libc6:arm64 2.41-12 <none>
2026-11-29 14:45:03 status unpacked libc6:arm64 2.41-12
2026-11-29 14:45:03 status half-configured libc6:arm64 2.41-12
2026-11-29 14:45:04 status installed libc6:arm64 2.41-12
"""

    def run(self, tmp_path, script):
        words = f"sleep() {{ /bin/sleep 0.01; }}\n. ../debian/lib.sh; ROOT={tmp_path}/root TMPDIR={tmp_path}\n{script}"
        return subprocess.run(
            ["sh", "-euc", words],
            cwd=TINY,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )

    def file(self, tmp_path, name, content=""):
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def test_before_there_is_one(self, tmp_path):
        assert self.run(tmp_path, "packages_so_far").stdout == ""

    def test_downloaded(self, tmp_path):
        for name in ("a.deb", "b.deb", "lock", "partial/c.part"):
            self.file(tmp_path, f"var/cache/apt/archives/{name}")
        assert self.run(tmp_path, "packages_so_far").stdout == "2 packages downloaded"

    def test_unpacked_and_configured(self, tmp_path):
        self.file(tmp_path, "var/log/dpkg.log", self.LOG)
        said = self.run(tmp_path, "packages_so_far").stdout
        assert said == "2 packages unpacked, 1 configured, now libc6"

    def test_while_a_program_runs(self, tmp_path):
        self.file(tmp_path, "var/log/dpkg.log", self.LOG)
        script = f"""
            what=installing
            stage() {{ echo "$@"; touch {tmp_path}/said; }}
            watched sh -c 'echo logged; until [ -e {tmp_path}/said ]; do sleep 0.01; done; exit 7' || echo $?
        """
        lines = self.run(tmp_path, script).stdout.splitlines()
        assert {*lines[:-1]} == {"installing: 2 packages unpacked, 1 configured, now libc6"}
        assert lines[-1] == "7"
        assert (tmp_path / "log").read_text() == "logged\n"


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode != 0,
    reason="no name spaces here",
)
@pytest.mark.parametrize("memory", [0, 10**9])
@pytest.mark.parametrize("place", ["/var/tmp", "/tmp"])
def test_nothing_is_hidden_by_the_tree(tmp_path, place, memory):
    """What a recipe needs may be anywhere: in /var/tmp, for instance, or in all places that are usually empty."""
    script = f"""
        for folder in {place} /mnt /media /srv; do
            [ ! -d $folder ] || {{ mount -t tmpfs tmpfs $folder; echo kept >$folder/kept; }}
        done
        VMSANDBOX_WORK={place}/work
        mkdir $VMSANDBOX_WORK
        . ../debian/lib.sh
        VMSANDBOX_OUTSIDE=-
        inside {memory}
        mkdir "$ROOT"
        for folder in {place} /mnt /media /srv; do [ ! -d $folder ] || cat $folder/kept; done
    """
    done = subprocess.run(
        [*UNSHARE, "sh", "-euc", script], cwd=TINY, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    expected = [Path(folder) for folder in (place, "/mnt", "/media", "/srv")]
    assert done.stdout.split() == ["kept" for folder in expected if folder.is_dir()]


@pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode != 0,
    reason="no name spaces here",
)
def test_the_tree_has_a_short_path(tmp_path):
    """One without characters that have a meaning in scripts, wherever the scratch folder is."""
    script = f"mount -t tmpfs tmpfs /media; VMSANDBOX_WORK='{tmp_path}'; . ../debian/lib.sh; inside 0; echo $ROOT"
    done = subprocess.run(
        [*UNSHARE, "sh", "-euc", script], cwd=TINY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in {"/mnt/root", "/media/root", "/run/media/root", "/var/mnt/root"}
