"""Run folders, and the verdict on accelerators."""

import fcntl
import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ConfigError, GuestLost, ImageError, LaunchError
from pytest_vmsandbox.machine import accelerator, host
from pytest_vmsandbox.machine.accelerator import Trial, Verdict, choose, recall
from pytest_vmsandbox.machine.hypervisor import Hypervisor, _run_folder
from pytest_vmsandbox.machine.process import LauncherError
from pytest_vmsandbox.machine.qemu import Qemu
from support import damage

VERDICT = Verdict(accelerator="kvm", processor="host", reason="proven", seconds=1.5)


class TestRunFolder:
    @pytest.fixture
    def root(self, tmp_path):
        root = tmp_path / "runtime"
        root.mkdir(mode=0o700)
        return root

    def test_is_private_and_gone_afterwards(self, tmp_path):
        root = tmp_path / "a" / "runtime"
        with _run_folder(root) as folder:
            assert folder.parent == root
            assert root.stat().st_mode & 0o777 == folder.stat().st_mode & 0o777 == 0o700
            (folder / "key").touch()
        assert not folder.exists()

    def test_those_of_dead_runs_are_removed(self, root):
        dead, bare = root / "1-0123abcd", root / "2-89efffff"
        for folder in (dead, bare):
            folder.mkdir()
            (folder / "key").touch()
        (dead / ".lock").touch()
        with _run_folder(root):
            assert not dead.exists()
            assert not bare.exists()

    def test_what_dead_runs_had_elsewhere_goes_along(self, root, tmp_path):
        """Where the launcher has been killed, too."""
        for name in ("logs/guests-1", "logs/guests-2", "logs/of-a-test"):
            (tmp_path / name).mkdir(parents=True)
        dead = root / "1-0123abcd"
        dead.mkdir()
        own: Any = Hypervisor.own
        own(SimpleNamespace(folder=dead), tmp_path / "logs" / "guests-1")
        with _run_folder(root) as live:
            own(SimpleNamespace(folder=live), tmp_path / "logs" / "guests-2")
            with _run_folder(root):
                left = {it.name for it in (tmp_path / "logs").iterdir()}
                assert left == {"guests-2", "of-a-test"}

    def test_those_of_live_runs_stay(self, root):
        with _run_folder(root) as live, _run_folder(root) as other:
            assert live.is_dir()
            assert live != other
        assert not live.exists()

    def test_a_lock_is_what_counts_not_a_number(self, root):
        alive = root / "999999999-aaaaaaaa"
        alive.mkdir()
        with (alive / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _run_folder(root):
                assert alive.is_dir()
        with _run_folder(root):
            assert not alive.exists()

    def test_what_is_no_run_is_left_alone(self, root, tmp_path):
        (root / "note").touch()
        (root / "1-0123abcd.old").mkdir()
        (root / "photos").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (root / "1-0123abcd").symlink_to(tmp_path / "elsewhere")
        before = set(root.iterdir())
        with _run_folder(root):
            assert before < set(root.iterdir())
        assert (tmp_path / "elsewhere").is_dir()

    def test_a_link_is_refused(self, root, tmp_path):
        link = tmp_path / "link"
        link.symlink_to(root)
        with pytest.raises(ConfigError, match="link is not private"), _run_folder(link):
            pass

    def test_one_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        root = tmp_path / "file" / "runtime"
        with pytest.raises(ConfigError, match=f"{root} cannot be used") as caught:
            _run_folder(root).__enter__()
        assert "VMSANDBOX_RUNTIME" in caught.value.remedy
        with pytest.raises(ConfigError, match=f"{root} cannot be used") as caught:
            Hypervisor.running(runtime=tmp_path / "runtime", cache=root).__enter__()
        assert "VMSANDBOX_CACHE" in caught.value.remedy

    def test_an_error_of_the_run_is_its_own(self, root):
        with pytest.raises(FileNotFoundError), _run_folder(root):
            raise FileNotFoundError

    @pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
    def test_a_folder_that_is_not_private_is_refused(self, root, mode):
        root.chmod(mode)
        with pytest.raises(ConfigError, match="is not private") as caught, _run_folder(root):
            pass
        assert "VMSANDBOX_RUNTIME" in caught.value.remedy

    def test_a_folder_of_somebody_else_is_refused(self, root, monkeypatch):
        monkeypatch.setattr("os.geteuid", lambda: root.stat().st_uid + 1)
        with pytest.raises(ConfigError, match="is not private"), _run_folder(root):
            pass

    def test_an_error_passes_through_and_leaves_nothing(self, root):
        with pytest.raises(KeyError, match="mine"), _run_folder(root):
            raise KeyError("mine")
        assert [path.name for path in root.iterdir()] == [".lock"]


def test_a_hypervisor_leaves_its_cache_and_nothing_else(tmp_path):
    runtime, cache = tmp_path / "runtime", tmp_path / "cache"
    with Hypervisor.running(runtime=runtime, cache=cache) as hypervisor:
        assert hypervisor.folder.is_dir()
        assert hypervisor.cache == cache
    assert not hypervisor.folder.exists()
    assert cache.stat().st_mode & 0o777 == 0o700


class TestRecall:
    def test_what_was_kept(self, tmp_path):
        file = tmp_path / "verdict"
        integrity.write_record(file, VERDICT.__dict__)
        assert recall(file) == VERDICT

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b"3",
            b'"kvm"',
            b"{}",
            b'{"accelerator": "kvm"}',
            b"\xff\xfe",
            json.dumps({**VERDICT.__dict__, "more": 1}).encode(),
        ],
    )
    def test_a_damaged_file_is_none(self, tmp_path, content):
        file = tmp_path / "verdict"
        file.write_bytes(content)
        assert recall(file) is None

    def test_no_file(self, tmp_path):
        assert recall(tmp_path / "none") is None
        assert recall(tmp_path) is None


class TestChoose:
    @pytest.fixture
    def kernel(self, tmp_path):
        file = tmp_path / "vmlinuz"
        file.write_bytes(b"kernel")
        return file

    @pytest.fixture
    def qemu(self):
        return Qemu(path=Path("/usr/bin/qemu"), version=(7, 2, 22), build="one")

    @pytest.fixture
    def proofs(self, monkeypatch):
        """What was proven; each proof finds that KVM runs guests."""
        proofs = []

        def prove(qemu, *_):
            proofs.append(qemu.build)
            return VERDICT

        monkeypatch.setattr(accelerator, "_prove", prove)
        monkeypatch.setattr(host, "kvm_problem", str)
        monkeypatch.setattr(sys, "platform", "linux")
        return proofs

    @pytest.fixture
    def started(self):
        """One for each time that the hypervisor was asked for."""
        return []

    @pytest.fixture
    def decide(self, kernel, qemu, tmp_path, proofs, started):
        def decide(wanted="auto", **changes):
            values = {
                "trial": Trial(architecture=ARCHITECTURES["x86_64"], kernel=kernel, initrd=kernel),
                "cache": tmp_path,
                "hypervisor": lambda: started.append(True),
                **changes,
            }
            return choose(wanted, values.pop("qemu", qemu), values.pop("trial"), **values)

        return decide

    def test_what_was_asked_for_is_not_proven(self, decide, proofs, started):
        assert decide("tcg").accelerator == "tcg"
        assert decide("kvm").accelerator == "kvm"
        assert proofs == started == []

    def test_what_was_proven_formerly_tells_how_fast_this_host_is(self, decide, proofs):
        assert decide("kvm").seconds == 0.0
        decide()
        asked = decide("kvm")
        assert (asked.seconds, asked.reason) == (VERDICT.seconds, "as asked for")
        assert decide("tcg").seconds == 0.0
        assert len(proofs) == 1

    def test_what_cannot_be_is_refused(self, decide, monkeypatch):
        monkeypatch.setattr(host, "kvm_problem", lambda: "it is switched off")
        with pytest.raises(
            LaunchError, match="the accelerator kvm cannot be used: it is switched off"
        ) as caught:
            decide("kvm")
        assert "--vm-accel=auto" in caught.value.remedy
        with pytest.raises(LaunchError, match="the accelerator hvf cannot be used"):
            decide("hvf")

    def test_without_kvm_it_is_emulation(self, decide, proofs, monkeypatch):
        monkeypatch.setattr(host, "kvm_problem", lambda: "it is switched off")
        verdict = decide()
        assert (verdict.accelerator, verdict.reason) == ("tcg", "it is switched off")
        assert verdict.time_scale > 1
        assert proofs == []

    def test_a_cache_that_cannot_be_used(self, decide, kernel):
        with pytest.raises(ConfigError, match=f"{kernel} cannot be used") as caught:
            decide(cache=kernel)
        assert "VMSANDBOX_CACHE" in caught.value.remedy

    def test_it_is_proven_once(self, decide, proofs, started):
        said = []
        assert decide(say=said.append) == decide(say=said.append) == VERDICT
        assert VERDICT.time_scale == 1
        assert len(proofs) == len(said) == len(started) == 1

    def test_a_damaged_verdict_is_proven_again(self, decide, proofs, tmp_path):
        decide()
        (file,) = (tmp_path / "accelerator").glob("*.json")
        file.write_text("{")
        assert decide() == VERDICT
        assert len(proofs) == 2
        assert recall(file) == VERDICT

    @pytest.mark.parametrize("harm", damage.KINDS)
    def test_damage_is_told_once(self, decide, proofs, tmp_path, harm):
        told = []
        decide()
        (file,) = (tmp_path / "accelerator").glob("*.json")
        damage.KINDS[harm](file)
        for _ in range(2):
            assert decide(tell=told.append) == VERDICT
        assert len(proofs) == 2
        assert told == (
            []  # nobody can know that there was one
            if harm == "removed"
            else ["the cached verdict on kvm was damaged, so kvm is tried again"]
        )

    def test_a_kernel_that_is_gone(self, decide, proofs, kernel):
        kernel.unlink()
        with pytest.raises(ImageError, match="vmlinuz cannot be read"):
            decide()

    def test_another_kernel_is_proven(self, decide, proofs, kernel):
        decide()
        kernel.write_bytes(b"another")
        decide()
        assert len(proofs) == 2

    def test_another_qemu_is_proven(self, decide, proofs, qemu):
        decide()
        decide(qemu=replace(qemu, build="two"))
        assert proofs == ["one", "two"]

    def test_after_a_boot_of_the_host_it_is_proven_again(self, decide, proofs, monkeypatch):
        decide()
        monkeypatch.setattr(accelerator, "_host_boot", lambda: "another")
        decide()
        assert len(proofs) == 2

    def test_nothing_temporary_is_left(self, decide, tmp_path):
        decide()
        names = sorted(path.suffix or path.name for path in (tmp_path / "accelerator").iterdir())
        assert names == [".json", ".lock"]


class TestProof:
    """What becomes a verdict, and what an error of today."""

    @pytest.fixture
    def outcomes(self, monkeypatch):
        """What becomes of the machines: an error, or none for one that runs."""
        outcomes = []
        clock = [0.0]

        @contextmanager
        def running(*_, **__):
            error = outcomes.pop(0)
            if isinstance(error, LaunchError):
                raise error

            yield error

        def wait(error, *, standstill, at_most):
            clock[0] += 1.5
            # Each model has all of it.
            assert standstill == accelerator.STANDSTILL_SECONDS
            assert at_most == accelerator.PROOF_SECONDS
            if error:
                raise error

        monkeypatch.setattr(accelerator, "Machine", SimpleNamespace(running=running))
        monkeypatch.setattr(accelerator, "wait_for_user_space", wait)
        monkeypatch.setattr(accelerator, "monotonic", lambda: clock[0])
        monkeypatch.setattr(accelerator, "processor_models", lambda *_: ("host", "max"))
        monkeypatch.setattr(host, "available_memory", lambda: None)
        return outcomes

    @pytest.fixture
    def launcher(self):
        return SimpleNamespace(check=lambda: None)

    @pytest.fixture
    def prove(self, tmp_path, launcher):
        qemu = Qemu(path=Path("/usr/bin/qemu"), version=(7, 2, 22), build="one")
        hypervisor: Any = SimpleNamespace(launcher=launcher, loop=None)
        trial = Trial(architecture=ARCHITECTURES["x86_64"], kernel=tmp_path, initrd=tmp_path)
        return lambda: accelerator._prove(qemu, trial, hypervisor)

    def test_the_second_model_may_run(self, prove, outcomes):
        outcomes += [GuestLost("kernel panic"), None]
        verdict = prove()
        assert (verdict.accelerator, verdict.processor) == ("kvm", "max")
        assert verdict.seconds == 1.5  # the pace of this host: what did not run tells nothing of it

    def test_the_reason_is_what_the_last_that_ran_did(self, prove, outcomes):
        outcomes += [GuestLost("kernel panic"), LaunchError("QEMU ended")]
        verdict = prove()
        assert (verdict.accelerator, verdict.seconds) == ("tcg", 0.0)
        assert verdict.reason.endswith("does not run guests: kernel panic")

    def test_none_ran(self, prove, outcomes):
        outcomes += [LaunchError("first"), LaunchError("second")]
        assert prove().reason.endswith(": second")

    def test_no_memory_now(self, prove, outcomes, monkeypatch):
        monkeypatch.setattr(host, "available_memory", lambda: 0)
        with pytest.raises(LaunchError, match="does not fit"):
            prove()

    def test_a_launcher_that_fails(self, prove, outcomes):
        outcomes += [LauncherError("could not be started")]
        with pytest.raises(LauncherError, match="could not be started"):
            prove()

    def test_a_launcher_that_is_gone(self, prove, outcomes, launcher):
        def check():
            raise LauncherError("gone")

        launcher.check = check
        outcomes += [GuestLost("QEMU ended with signal SIGKILL")]
        with pytest.raises(LauncherError, match="gone"):
            prove()
