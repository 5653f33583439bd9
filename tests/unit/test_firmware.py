"""Which firmware is taken, what a disk offers to it, and each machine's own copy."""

import json
import os
import socket
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import LaunchError
from pytest_vmsandbox.machine import firmware, tpm
from pytest_vmsandbox.machine.firmware import Flash, boot_loaders, find_uefi, matching

ESP = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")
PLAIN = ["acpi-s3"]
NOWHERE: dict[str, Any] = {"ovmf": {}, "qemu-efi-aarch64": {}}
SECURE = ["enrolled-keys", "requires-smm", "secure-boot"]


def description(folder, features=PLAIN, **changes):
    """What a package says about its firmware, as QEMU's docs/interop/firmware.json has it."""
    mapping = {
        "device": "flash",
        "executable": {"filename": f"{folder}/code", "format": "raw"},
        "nvram-template": {"filename": f"{folder}/variables", "format": "raw"},
    }
    return {
        "interface-types": ["uefi"],
        "mapping": mapping,
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": features,
        **changes,
    }


class TestMatching:
    @pytest.mark.parametrize(
        ("features", "secure_boot", "expected"),
        [
            (PLAIN, False, True),
            (PLAIN, True, False),
            (SECURE, True, True),
            (SECURE, False, False),
            (["secure-boot", "requires-smm"], True, False),  # without keys it would accept anything
            (["secure-boot", "requires-smm"], False, False),
            (["requires-smm"], False, False),
        ],
    )
    def test_features(self, tmp_path, features, secure_boot, expected):
        content = description(tmp_path, features)
        found = matching(content, "x86_64", secure_boot=secure_boot)
        paths = (tmp_path / "code", tmp_path / "variables", "raw")
        assert found == (paths if expected else None)

    def test_the_format_of_fedora(self, tmp_path):
        content = description(tmp_path)
        for part in ("executable", "nvram-template"):
            content["mapping"][part]["format"] = "qcow2"
        found = matching(content, "x86_64", secure_boot=False)
        assert found is not None
        assert found[2] == "qcow2"
        content["mapping"]["executable"]["format"] = "vmdk"
        assert matching(content, "x86_64", secure_boot=False) is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"interface-types": ["bios"]},
            {"mapping": {"device": "memory", "filename": "/f"}},
            {"mapping": {"device": "flash", "mode": "stateless", "executable": {}}},
            {"targets": [{"architecture": "aarch64", "machines": ["virt-*"]}]},
            {"targets": [{"architecture": "x86_64", "machines": ["microvm"]}]},
        ],
    )
    def test_of_others(self, tmp_path, changes):
        assert matching(description(tmp_path, **changes), "x86_64", secure_boot=False) is None


class TestFinding:
    @pytest.fixture
    def folders(self, tmp_path, monkeypatch):
        """Where descriptions are, the weaker one first; the usual places are empty."""
        folders = [tmp_path / "vendor", tmp_path / "administrator"]
        for folder in folders:
            folder.mkdir()
        monkeypatch.setattr(firmware, "_DESCRIPTORS", folders)
        monkeypatch.setattr(firmware, "_USUAL_PLACES", NOWHERE)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        return folders

    @staticmethod
    def install(where, name, features=PLAIN):
        files = where / f"{name}.files"
        files.mkdir()
        (files / "code").write_bytes(b"code of " + name.encode())
        (files / "variables").write_bytes(b"variables")
        (where / f"{name}.json").write_text(json.dumps(description(files, features)))
        return files

    def test_by_the_order_of_names(self, folders):
        self.install(folders[0], "60-b")
        files = self.install(folders[0], "50-a")
        self.install(folders[0], "40-secure", SECURE)
        assert find_uefi("x86_64", secure_boot=False).code == files / "code"

    def test_one_with_secure_boot(self, folders):
        self.install(folders[0], "50-plain")
        files = self.install(folders[0], "60-secure", SECURE)
        found = find_uefi("x86_64", secure_boot=True)
        assert (found.variables, found.secure_boot) == (files / "variables", True)

    def test_the_administrators_word_counts(self, folders):
        self.install(folders[0], "50-a")
        files = self.install(folders[0], "60-b")
        (folders[1] / "50-a.json").write_text("")  # hides it
        assert find_uefi("x86_64", secure_boot=False).code == files / "code"

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"features": []}', "\x00", '"x"'])
    def test_a_description_that_is_broken(self, folders, text):
        files = self.install(folders[0], "50-a")
        (folders[0] / "40-broken.json").write_text(text)
        assert find_uefi("x86_64", secure_boot=False).code == files / "code"

    def test_a_description_of_what_is_gone(self, folders):
        files = self.install(folders[0], "50-a")
        (self.install(folders[0], "40-gone") / "code").unlink()
        assert find_uefi("x86_64", secure_boot=False).code == files / "code"

    def test_the_usual_places(self, folders, tmp_path, monkeypatch):
        files = self.install(tmp_path, "files")
        pair = (str(files / "code"), str(files / "variables"))
        missing = (str(tmp_path / "no"), str(tmp_path / "no"))
        monkeypatch.setattr(firmware, "_USUAL_PLACES", {"ovmf": {False: (missing, pair)}})
        assert find_uefi("x86_64", secure_boot=False).code == files / "code"

    @pytest.mark.parametrize("secure_boot", [False, True])
    def test_none(self, folders, secure_boot):
        with pytest.raises(LaunchError, match="there is no UEFI firmware") as caught:
            find_uefi("x86_64", secure_boot=secure_boot)
        assert ("with Secure Boot" in caught.value.brief) is secure_boot
        assert "ovmf" in caught.value.remedy

    def test_none_for_that_architecture(self, folders):
        self.install(folders[0], "50-a")
        with pytest.raises(
            LaunchError, match="there is no UEFI firmware for guests of arm64"
        ) as error:
            find_uefi("aarch64", secure_boot=False)
        assert "qemu-efi-aarch64" in error.value.remedy

    def test_that_of_arm64(self, folders):
        self.install(folders[0], "50-a")
        files = self.install(folders[0], "60-arm")
        of_arm = [{"architecture": "aarch64", "machines": ["virt-*"]}]
        (folders[0] / "60-arm.json").write_text(json.dumps(description(files, targets=of_arm)))
        assert find_uefi("aarch64", secure_boot=False).code == files / "code"

    @pytest.mark.parametrize(
        ("name", "secure_boot"), [("riscv64", False), ("i686", False), ("aarch64", True)]
    )
    def test_what_we_cannot_boot(self, folders, name, secure_boot):
        with pytest.raises(
            LaunchError, match=f"guests of {ARCHITECTURES[name].debian} cannot be booted by UEFI"
        ):
            find_uefi(name, secure_boot=secure_boot)

    def test_its_digest_is_of_both_files(self, folders):
        files = self.install(folders[0], "50-a")
        digests = {find_uefi("x86_64", secure_boot=False).digest}
        for name in ("code", "variables"):
            (files / name).write_bytes(b"a newer one of " + name.encode())
            digests.add(find_uefi("x86_64", secure_boot=False).digest)
        assert len(digests) == 3

    def test_each_machine_has_its_own_variables(self, folders, tmp_path):
        self.install(folders[0], "50-a")
        uefi = find_uefi("x86_64", secure_boot=False)
        before = os.listdir(tmp_path)
        with Flash.open(uefi, tmp_path) as one, Flash.open(uefi, tmp_path) as two:
            one.variables.write(b" changed")
            two.variables.seek(0)
            assert two.variables.read() == b"variables"
            assert os.listdir(tmp_path) == before  # they have no names
            assert one.code.read() == b"code of 50-a"
        assert uefi.variables.read_bytes() == b"variables"

    def test_no_room_for_the_copy(self, folders, tmp_path):
        self.install(folders[0], "50-a")
        uefi = find_uefi("x86_64", secure_boot=False)
        with (
            pytest.raises(LaunchError, match="cannot be copied into") as caught,
            Flash.open(uefi, tmp_path / "missing"),
        ):
            pass
        assert "VMSANDBOX_CACHE" in caught.value.remedy


class TestDisk:
    @staticmethod
    def disk(tmp_path, *, code=b"", mbr_type=0, gpt=(), size=128, count=None):
        first = bytearray(512)
        first[: len(code)] = code
        first[446 + 4] = mbr_type
        first[510:] = b"\x55\xaa"
        header = bytearray(512)
        header[:8] = b"EFI PART"
        count = len(gpt) if count is None else count
        struct.pack_into("<QII", header, 72, 2, count, size)
        table = b"".join(kind.ljust(size, b"\0") for kind in gpt)
        file = tmp_path / "disk"
        file.write_bytes(first + (header if gpt else b"") + table)
        return file

    @pytest.mark.parametrize(
        ("layout", "found"),
        [
            ({}, set()),
            ({"code": b"\xeb"}, {"bios"}),
            ({"mbr_type": 0xEF}, {"uefi"}),
            ({"mbr_type": 0x83, "code": b"\xeb"}, {"bios"}),
            ({"gpt": [ESP]}, {"uefi"}),
            ({"gpt": [bytes(16), b"\1" * 16, ESP], "code": b"\xeb"}, {"bios", "uefi"}),
            ({"gpt": [bytes(16), ESP], "size": 256}, {"uefi"}),
            ({"gpt": [b"\1" * 16]}, set()),
            ({"gpt": [ESP], "size": 0}, set()),
            ({"gpt": [ESP], "count": 1 << 31}, set()),
            ({"gpt": [ESP], "count": 4}, {"uefi"}),  # the disk ends before the table
        ],
    )
    def test_partitions(self, tmp_path, layout, found):
        if layout.get("size") == 0:
            layout = {**layout, "size": 128}
            file = self.disk(tmp_path, **layout)
            content = bytearray(file.read_bytes())
            struct.pack_into("<I", content, 512 + 84, 0)
            file.write_bytes(content)
        else:
            file = self.disk(tmp_path, **layout)
        assert boot_loaders(file) == found

    @pytest.mark.parametrize("content", [b"", b"\0" * 511, b"\0" * 4096])
    def test_without_any(self, tmp_path, content):
        (tmp_path / "disk").write_bytes(content)
        assert boot_loaders(tmp_path / "disk") == set()

    def test_that_is_gone(self, tmp_path):
        with pytest.raises(OSError, match="disk"):
            boot_loaders(tmp_path / "disk")


class TestTpm:
    def test_without_the_program(self, monkeypatch):
        monkeypatch.setattr(programs, "find", lambda _: None)
        with pytest.raises(LaunchError, match="there is no swtpm") as caught:
            tpm.find_swtpm()
        assert "swtpm" in caught.value.remedy

    def test_it_opens_nothing_by_name(self):
        argv = tpm.argv("/usr/bin/swtpm")
        assert argv[0] == "/usr/bin/swtpm"
        assert [word for word in argv[1:] if "/" in word] == ["dir=/proc/self/fd/4,mode=0600"]
        assert "--tpm2" in argv

    @pytest.mark.parametrize(
        ("lines", "hint"),
        [
            ("", False),
            ("swtpm: Data client disconnected\n", False),
            ("SWTPM_NVRAM_Lock_Lockfile: Could not open lockfile: Permission denied\n", True),
        ],
    )
    def test_what_it_says(self, lines, hint):
        """Where AppArmor confines it, its own words do not tell that."""
        process: Any = SimpleNamespace(stderr_tail=lines)
        with socket.socket() as channel:
            said = tpm.Tpm(process=process, channel=channel).said
        assert lines in said
        assert ("AppArmor" in said) is ("VMSANDBOX_CACHE" in said) is hint
