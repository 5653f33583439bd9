"""The QEMU of this machine, its memory, its users; disks made with the real qemu-img."""

import errno
import json
import os
import pwd
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ImageError, LaunchError
from pytest_vmsandbox.core.spec import GIB, KIB, MIB
from pytest_vmsandbox.machine import disk as disk_module, host
from pytest_vmsandbox.machine.disk import Disks
from pytest_vmsandbox.machine.process import Identity
from pytest_vmsandbox.machine.qemu import find_qemu

NEEDS_QEMU_IMG = pytest.mark.skipif(
    not shutil.which("qemu-img") and not os.environ.get("CI"), reason="there is no qemu-img here"
)


class TestQemu:
    def program(self, folder, says, name="qemu-system-x86_64"):
        file = folder / name
        file.write_text(f"#!/bin/sh\n{says}\n")
        file.chmod(0o755)
        return file

    @pytest.fixture(autouse=True)
    def path(self, tmp_path, monkeypatch):
        monkeypatch.delenv("VMSANDBOX_QEMU", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize(
        ("says", "version"),
        [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)),
            ("QEMU emulator version 10.0.2", (10, 0, 2)),
            ("QEMU emulator version 9.1", (9, 1)),
            ("QEMU emulator version 10.1.0-rc2 (v10.1.0)", (10, 1, 0)),
            ("warning: something\nQEMU emulator version 8.2.1", (8, 2, 1)),
        ],
    )
    def test_version(self, path, says, version):
        file = self.program(path, f"echo '{says}'")
        qemu = find_qemu("x86_64")
        assert (qemu.path, qemu.version) == (file, version)
        assert qemu.release == ".".join(map(str, version))

    @pytest.mark.parametrize(
        "script", ["echo hello", "exit 1", "echo 'cannot load libfoo' >&2; exit 127", "kill -9 $$"]
    )
    def test_one_that_does_not_tell(self, path, script):
        self.program(path, script)
        with pytest.raises(LaunchError, match="does not print the version of a QEMU"):
            find_qemu("x86_64")

    def test_one_that_cannot_be_executed(self, path):
        (path / "qemu-system-x86_64").write_bytes(b"\x7fELF nonsense")
        (path / "qemu-system-x86_64").chmod(0o755)
        with pytest.raises(LaunchError, match="does not print the version of a QEMU"):
            find_qemu("x86_64")

    def test_none(self):
        with pytest.raises(LaunchError, match="there is no qemu-system-aarch64") as caught:
            find_qemu("aarch64")
        assert "qemu-system-arm" in caught.value.remedy

    def test_another_one_by_a_variable(self, path, monkeypatch):
        file = self.program(path, "echo QEMU emulator version 1.2.3", "mine")
        monkeypatch.setenv("VMSANDBOX_QEMU", str(file))
        assert find_qemu("x86_64").path == file
        monkeypatch.setenv("VMSANDBOX_QEMU", "/nowhere/qemu")
        with pytest.raises(LaunchError, match="there is no /nowhere/qemu"):
            find_qemu("x86_64")

    @pytest.mark.parametrize(
        ("architecture", "targets"),
        [("x86_64", ["x86_64"]), ("i686", ["x86_64", "i386"]), ("armv7l", ["aarch64", "arm"])],
    )
    def test_one_that_emulates_something_else(self, path, monkeypatch, architecture, targets):
        for target in ("x86_64", "i386", "aarch64", "arm", "s390x", ""):
            answer = f'echo \'{{"return": {{"arch": "{target}"}}}}\''
            says = f"[ $1 != -machine ] || {answer}\necho QEMU emulator version 1.2.3"
            file = self.program(path, says, f"mine-{target}")
            debian = ARCHITECTURES[architecture].debian
            monkeypatch.setenv(f"VMSANDBOX_QEMU_{debian.upper()}", str(file))
            if target in {*targets, ""}:
                assert find_qemu(architecture).path == file
            else:
                with pytest.raises(LaunchError, match=f"emulates {target}") as caught:
                    find_qemu(architecture)
                assert f"VMSANDBOX_QEMU_{debian.upper()}" in caught.value.remedy

    def test_another_program_with_a_version(self, path, monkeypatch):
        """Each of GNU's names version 3 of its license."""
        file = self.program(path, "echo 'true 9.1, GPL version 3'", "mine")
        monkeypatch.setenv("VMSANDBOX_QEMU_ARM64", str(file))
        with pytest.raises(LaunchError, match="does not print the version of a QEMU") as caught:
            find_qemu("aarch64")
        assert "VMSANDBOX_QEMU_ARM64" in caught.value.remedy

    def test_none_by_a_variable(self, monkeypatch):
        monkeypatch.setenv("VMSANDBOX_QEMU_ARM64", "qemu-none")
        with pytest.raises(LaunchError, match="there is no qemu-none") as caught:
            find_qemu("aarch64")
        assert "VMSANDBOX_QEMU_ARM64" in caught.value.remedy
        assert "apt" not in caught.value.remedy

    def test_a_new_build_is_noticed(self, path):
        self.program(path, "echo QEMU emulator version 1.2.3")
        first = find_qemu("x86_64")
        self.program(path, "echo QEMU emulator version 1.2.3 again")
        assert find_qemu("x86_64").build != first.build

    def test_a_copy_is_the_same_build(self, path):
        """Templates are found on another machine with the same QEMU."""
        file = self.program(path, "echo QEMU emulator version 1.2.3")
        first = find_qemu("x86_64")
        os.utime(file, (1, 1))
        assert find_qemu("x86_64").build == first.build


class TestMemory:
    @pytest.mark.parametrize(
        ("available", "size", "fits"),
        [
            (GIB, 512 * MIB, True),
            (512 * MIB, 512 * MIB, False),
            (0, MIB, False),
            (608 * MIB, 512 * MIB, True),
            (608 * MIB - 1, 512 * MIB, False),
            (None, GIB, True),
        ],
    )
    def test_a_guest_has_to_fit(self, monkeypatch, available, size, fits):
        monkeypatch.setattr(host, "available_memory", lambda: available)
        if fits:
            host.require_memory(size)
        else:
            with pytest.raises(LaunchError, match="does not fit: this machine has") as caught:
                host.require_memory(size)
            assert "memory=" in caught.value.remedy

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_this_host_tells(self):
        available = host.available_memory()
        assert available is not None
        assert available > 16 * MIB

    def test_the_page_cache_of_a_container_is_available(self, tmp_path, monkeypatch):
        monkeypatch.setattr(host, "_CGROUP", tmp_path)
        (tmp_path / "memory.max").write_text("9000\n")
        (tmp_path / "memory.current").write_text("8000\n")
        (tmp_path / "memory.stat").write_text(
            "anon 500\nfile 7000\ninactive_file 4000\nactive_file 2000\nunevictable 0\n"
        )
        assert host.available_memory() == 7000


class TestIdentity:
    @pytest.fixture
    def root(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(host, "_all_users_mapped", lambda: True)
        monkeypatch.setattr(host, "_may_change_user", lambda: True)

    def kvm(self, monkeypatch, mode):
        kvm = SimpleNamespace(
            exists=lambda: True, stat=lambda: SimpleNamespace(st_mode=mode, st_gid=77)
        )
        monkeypatch.setattr(host, "KVM", kvm)

    def test_an_ordinary_user_stays_who_they_are(self, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        assert host.guest_identity("tcg") is None

    def test_root_becomes_a_user_without_a_name(self, root):
        identity = host.guest_identity("tcg")
        assert identity is not None
        assert 61184 <= identity.uid < 65520
        assert identity.groups == ()

    @pytest.mark.parametrize(("mode", "groups"), [(0o20666, ()), (0o20660, (77,)), (0o20600, None)])
    def test_kvm_has_to_be_open_to_them(self, root, monkeypatch, mode, groups):
        self.kvm(monkeypatch, mode)
        identity = host.guest_identity("kvm")
        assert (identity.groups if identity else None) == groups

    def test_a_user_who_exists_is_not_taken(self, root, monkeypatch):
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: ("somebody",))
        assert host.guest_identity("tcg") == Identity(uid=65534, gid=65534)

    @pytest.mark.parametrize(
        ("uid_map", "mapped"),
        [
            ("         0          0 4294967295\n", True),
            ("0 100000 65536\n", True),
            ("0 1000 1\n", False),
            ("0 1000 1\n1 100000 65535\n", True),
            ("0 100000 65000\n", False),
        ],
    )
    def test_a_container_may_not_have_them(self, monkeypatch, uid_map, mapped):
        monkeypatch.setattr(Path, "read_text", lambda _, **_encoding: uid_map)
        assert host._all_users_mapped() is mapped

    @pytest.mark.parametrize(
        ("capabilities", "may"),
        [("000001ffffffffff", True), ("c0", True), ("80", False), ("40", False), ("0", False)],
    )
    def test_root_of_a_container_may_not_become_them(self, monkeypatch, capabilities, may):
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(host, "_all_users_mapped", lambda: True)
        status = f"Name:\tpython\nCapPrm:\t0\nCapEff:\t{capabilities}\n"
        monkeypatch.setattr(Path, "read_text", lambda _, **_encoding: status)
        assert (host.guest_identity("tcg") is not None) is may


class TestKvm:
    def test_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(host, "KVM", tmp_path / "kvm")
        assert "there is no" in host.kvm_problem()
        (tmp_path / "kvm").touch()
        assert host.kvm_problem() == ""
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert "usermod" in host.kvm_problem()

    def test_another_system(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        assert "Linux" in host.kvm_problem()


@NEEDS_QEMU_IMG
class TestDisks:
    def info(self, file):
        done = subprocess.run(
            ["qemu-img", "info", "-f", "qcow2", "--output=json", f"/proc/self/fd/{file.fileno()}"],
            pass_fds=[file.fileno()],
            capture_output=True,
            check=True,
        )
        return json.loads(done.stdout)

    @pytest.fixture
    def base(self, tmp_path):
        file = tmp_path / "disk.raw"
        with file.open("wb") as stream:
            stream.truncate(4 * MIB)
        return file

    @pytest.mark.parametrize(("root_size", "size"), [(None, 4 * MIB), (8 * MIB, 8 * MIB)])
    def test_sizes(self, tmp_path, base, root_size, size):
        folder = tmp_path / "cache"
        folder.mkdir()
        blank = [MIB, 3 * GIB]
        with Disks.open(base=base, root_size=root_size, blank=blank, folder=folder) as disks:
            assert disks.sizes == (size, MIB, 3 * GIB)
            tops = [file for (file,) in disks.overlays]
            infos = [self.info(file) for file in tops]
            assert [info["virtual-size"] for info in infos] == [size, MIB, 3 * GIB]
            assert not any("backing-filename" in info for info in infos)
            assert disks.base is not None
            assert disks.base.mode == "rb"
            assert list(folder.iterdir()) == []
            files = [disks.base, *tops]
        assert all(file.closed for file in files)

    def test_none(self, tmp_path):
        with Disks.open(base=None, root_size=None, blank=[], folder=tmp_path) as disks:
            assert disks == Disks(base=None, overlays=())

    def test_two_of_a_size_are_two(self, tmp_path):
        with Disks.open(base=None, root_size=None, blank=[MIB, MIB], folder=tmp_path) as disks:
            (first,), (second,) = disks.overlays
            first.seek(0)
            first.write(b"gone")
            second.seek(0)
            assert second.read(4) == b"QFI\xfb"

    def test_what_was_written_before_lies_below(self, tmp_path):
        before = tmp_path / "before"
        before.write_bytes(b"before")
        with Disks.open(
            base=None, root_size=None, blank=[MIB, MIB], folder=tmp_path, frozen=[[before], []]
        ) as disks:
            (below, _), (_,) = disks.overlays
            assert (below.mode, below.read()) == ("rb", b"before")
        assert below.closed

    def test_on_top_of_what_is_frozen(self, tmp_path):
        with (
            Disks.open(base=None, root_size=None, blank=[MIB], folder=tmp_path) as disks,
            ExitStack() as stack,
        ):
            frozen = disks.frozen(stack)
            ((below,),) = frozen.overlays
            with disk_module.empty_overlay(MIB, tmp_path) as fresh:
                assert below.mode == "rb"
                later = frozen.on_top({MIB: fresh}.__getitem__)
                assert later.overlays == ((below, fresh),)
                assert later.sizes == disks.sizes

    def test_an_image_that_is_gone(self, tmp_path):
        with (
            pytest.raises(ImageError, match="cannot be read"),
            Disks.open(base=tmp_path / "none", root_size=None, blank=[], folder=tmp_path),
        ):
            pass

    def test_a_size_that_is_refused(self, tmp_path):
        with (
            pytest.raises(LaunchError, match="could not make a disk of") as caught,
            Disks.open(base=None, root_size=None, blank=[1 << 62], folder=tmp_path),
        ):
            pass
        assert caught.value.details

    def test_no_qemu_img(self, tmp_path, monkeypatch):
        disk_module._empty_qcow2.cache_clear()
        monkeypatch.setenv("PATH", str(tmp_path))
        with (
            pytest.raises(LaunchError, match="there is no qemu-img"),
            Disks.open(base=None, root_size=None, blank=[5 * KIB], folder=tmp_path),
        ):
            pass


class TestLoopback:
    """A network namespace begins without it: addresses can be bound, and not reached."""

    @pytest.fixture
    def unreachable(self, monkeypatch):
        def connect(address, timeout):
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

        monkeypatch.setattr(socket, "create_connection", connect)

    def test_it_works_here(self):
        host.require_loopback()
        assert host.loopback_problem() == ""

    def test_it_is_off(self, unreachable):
        assert host.loopback_problem() == "Network is unreachable"
        with pytest.raises(LaunchError, match="127.0.0.1 cannot be reached") as raised:
            host.require_loopback()
        assert "ip link set lo up" in str(raised.value)


class TestDescriptors:
    """How many files this process may have open; one of its own shows it."""

    @pytest.fixture
    def limited(self):
        """Runs a function of this host in a process with such limits, and tells its limits then."""

        def run(soft, hard, function):
            script = (
                "import resource, sys; from pytest_vmsandbox.machine import host\n"
                f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"
                f"host.{function}()\n"
                "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
            )
            return subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, check=False
            )

        return run

    @pytest.mark.parametrize(("soft", "hard"), [(64, 700), (700, 700), (256, 1024)])
    def test_as_many_as_are_allowed(self, limited, soft, hard):
        assert limited(soft, hard, "raise_descriptor_limit").stdout.split() == [f"{hard}"] * 2

    @pytest.mark.parametrize(
        ("soft", "hard", "wanted"),
        [
            (1024, 1 << 30, 65_536),
            (1024, resource.RLIM_INFINITY, 65_536),
            (1 << 20, 1 << 30, None),
            (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
        ],
    )
    def test_within_reason(self, monkeypatch, soft, hard, wanted):
        asked = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
        host.raise_descriptor_limit()
        assert asked == ([(wanted, hard)] if wanted else [])

    @pytest.mark.parametrize("limit", [64, 255])
    def test_too_few_for_a_guest(self, limited, limit):
        done = limited(limit, limit, "require_descriptors")
        assert f"files open and may open {limit}, which is too few" in done.stderr
        assert "Remedy: raise the limit: ulimit -n 65536 (shell)" in done.stderr

    def test_enough(self, limited):
        assert limited(300, 300, "require_descriptors").returncode == 0

    def test_most_are_in_use(self, monkeypatch, tmp_path):
        limit = len(os.listdir("/proc/self/fd")) + 400
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        host.require_descriptors()
        with ExitStack() as stack:
            for _ in range(350):
                stack.enter_context(open(os.devnull, encoding="utf-8"))
            with pytest.raises(LaunchError, match="too few for another guest"):
                host.require_descriptors()
