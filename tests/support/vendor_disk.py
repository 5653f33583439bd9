"""Disks as vendors lay them out: a GPT, a boot loader for BIOS and one for UEFI, no kernel outside.

They are made from our own images, as an ordinary user and without loop devices. The programs that it
needs are in these packages of Debian: gdisk, dosfstools, mtools, grub-pc-bin, grub-efi-amd64-bin.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.builder import build
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.store import DISK, HOST_KEY, BuiltImage, ImageStore
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.guests.reaching.access import KeyPair

NEEDED = ("sgdisk", "mkfs.vfat", "mcopy", "grub-mkimage", "mke2fs", "debugfs", "unshare")
LABEL = "root"

_GRUB = Path("/usr/lib/grub")
_GRUB_MODULES = (
    *("part_gpt", "fat", "ext2", "search", "search_fs_file", "search_label", "normal"),
    *("configfile", "linux", "serial", "terminal", "echo"),
)
_SECTOR = 512
_FIRST = 2048  # sectors before the first partition
_BIOS_BOOT = 2 * MIB
_ESP = 64 * MIB
_LAST = MIB  # for the second GPT
_BOOTX64 = "EFI/BOOT/BOOTX64.EFI"

# Runs as root in name spaces of its own: a copy of a root file system, with a few changes.
_ROOT_SCRIPT = r"""
set -eu
mount -t tmpfs -o mode=0755 tmpfs "$TREE"
debugfs -R "rdump / $TREE" "$SOURCE" >/dev/null 2>&1
rm -rf "$TREE/lost+found"
cp -a "$OVERLAY/." "$TREE/"
chown -R 0:0 "$TREE/root" "$TREE/boot" "$TREE/etc/fstab"
chmod 0700 "$TREE/root/.ssh"
mkdir -p "$TREE/boot/efi"
truncate -s "$SIZE" "$OUT"
mke2fs -q -F -t ext4 -L root -m 0 -b 4096 -O ^orphan_file,^metadata_csum_seed \
    -E lazy_itable_init=1,lazy_journal_init=1,nodiscard -J size=16 -d "$TREE" "$OUT"
"""


def missing_packages() -> list[str]:
    """The packages of Debian that this machine lacks for making such disks."""
    found = [programs.package_of(program) for program in programs.missing(NEEDED)]
    folders = {"grub-pc-bin": _GRUB / "i386-pc", "grub-efi-amd64-bin": _GRUB / "x86_64-efi"}
    return sorted({*found, *(name for name, folder in folders.items() if not folder.is_dir())})


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is on a disk.

    Attributes:
        esp: files of the EFI system partition: path there → file here, or its content.
        root: a file with the root file system, or None.
        core: GRUB's image for BIOS, or None.
    """

    esp: Mapping[str, Path | bytes]
    root: Path | None = None
    core: Path | None = None


def lay_out(disk: Path, contents: Contents) -> None:
    """Write a raw disk."""
    sizes = [("14", "ef02", _BIOS_BOOT), ("15", "ef00", _ESP)]
    if contents.root is not None:
        sizes.append(("1", "8300", contents.root.stat().st_size))
    arguments, at, places = [], _FIRST * _SECTOR, {}
    for number, kind, size in sizes:
        places[number] = at
        first, last = at // _SECTOR, (at + size) // _SECTOR - 1
        arguments += ["-n", f"{number}:{first}:{last}", "-t", f"{number}:{kind}"]
        at += size
    with disk.open("wb") as file:
        file.truncate(at + _LAST)
    _run("sgdisk", *arguments, disk)
    with TemporaryDirectory() as folder:
        esp = Path(folder, "esp")
        _write_esp(esp, contents.esp)
        _copy_into(disk, places["15"], esp)
    if contents.root is not None:
        _copy_into(disk, places["1"], contents.root)
    if contents.core is not None:
        _embed_grub(disk, places["14"], contents.core)


def _write_esp(esp: Path, files: Mapping[str, Path | bytes]) -> None:
    with esp.open("wb") as file:
        file.truncate(_ESP)
    _run("mkfs.vfat", "-n", "UEFI", esp)
    made: set[Path] = set()
    for name, content in files.items():
        for folder in reversed(Path(name).parents[:-1]):
            if folder not in made:
                _run("mmd", "-i", esp, f"::{folder}")
                made.add(folder)
        source = content if isinstance(content, Path) else "-"
        given = content if isinstance(content, bytes) else None
        _run("mcopy", "-i", esp, source, f"::{name}", given=given)


def _embed_grub(disk: Path, place: int, image: Path) -> None:
    """GRUB's first stage knows the sector of the second; that one knows where its rest is."""
    boot = bytearray((_GRUB / "i386-pc/boot.img").read_bytes())
    core = bytearray(image.read_bytes())
    core += bytes(-len(core) % _SECTOR)
    first = place // _SECTOR
    struct.pack_into("<Q", boot, 0x5C, first)
    struct.pack_into("<QHH", core, 0x1F4, first + 1, len(core) // _SECTOR - 1, 0x820)
    with disk.open("r+b") as file:
        file.write(boot[:440])  # what follows is the table of partitions
        file.seek(510)
        file.write(b"\x55\xaa")
        file.seek(place)
        file.write(core)


def grub_images(folder: Path, config: str) -> tuple[Path, Path]:
    """GRUB for UEFI and for BIOS, with a configuration in it."""
    (folder / "early.cfg").write_text(config)
    images = []
    for target, more in (("x86_64-efi", ()), ("i386-pc", ("biosdisk",))):
        image = folder / f"grub.{target}"
        options = ("-O", target, "-o", image, "-p", "/grub", "-c", folder / "early.cfg")
        _run("grub-mkimage", *options, *_GRUB_MODULES, *more)
        images.append(image)
    return images[0], images[1]


def menu(kernel: str, initrd: str, append: str) -> str:
    """A configuration of GRUB."""
    return (
        "serial --unit=0 --speed=115200\nterminal_output serial console\nset timeout=0\n"
        f"menuentry Linux {{\n  linux {kernel} {append}\n  initrd {initrd}\n}}\n"
    )


# -- two systems -----------------------------------------------------------------------------------


def tiny(disk: Path, built: BuiltImage, append: str) -> None:
    """A disk that boots `tiny`. Kernel and initial RAM disk are in the EFI system partition."""
    assert built.kernel is not None
    assert built.initrd is not None
    with TemporaryDirectory() as name:
        early = "search --no-floppy --file --set=root /vmlinuz\nconfigfile /grub/grub.cfg\n"
        efi, core = grub_images(Path(name), early)
        esp: dict[str, Path | bytes] = {
            _BOOTX64: efi,
            "grub/grub.cfg": menu("/vmlinuz", "/initrd.img", append).encode(),
            "vmlinuz": built.kernel,
            "initrd.img": built.initrd,
        }
        lay_out(disk, Contents(esp=esp, core=core))


@dataclass(frozen=True, kw_only=True)
class Debian:
    """A disk with Debian.

    Attributes:
        built: one of our images of Debian.
        size: bytes of its root file system.
        keys: the public keys that open it: user → lines of authorized_keys.
        append: more for the kernel's command line.
        efi: files of the EFI system partition, instead of a GRUB of our own.
    """

    built: BuiltImage
    size: int = 1536 * MIB
    keys: Mapping[str, Iterable[str]] = field(default_factory=dict)
    append: str = ""
    efi: Mapping[str, Path | bytes] = field(default_factory=dict)

    def write(self, disk: Path, work: Path) -> None:
        """Write the disk. `work` is a folder with room for the root file system."""
        with TemporaryDirectory(dir=work) as name:
            folder = Path(name)
            folder.chmod(0o755)  # for the name spaces
            root, overlay = folder / "root", folder / "overlay"
            self._write_overlay(overlay)
            (folder / "tree").mkdir()
            user = [] if os.geteuid() == 0 else ["--user", "--map-root-user", "--map-auto"]
            _run(
                *("unshare", *user, "--mount", "--pid", "--fork", "--kill-child"),
                *("sh", "-c", _ROOT_SCRIPT),
                env={
                    "TREE": f"{folder}/tree",
                    "SOURCE": str(self.built.disk),
                    "OVERLAY": str(overlay),
                    "SIZE": str(self.size),
                    "OUT": str(root),
                },
            )
            early = (
                f"search --no-floppy --label --set=root {LABEL}\n"
                "set prefix=($root)/boot/grub\nconfigfile /boot/grub/grub.cfg\n"
            )
            efi, core = grub_images(folder, early)
            esp = dict(self.efi) or {_BOOTX64: efi}
            lay_out(disk, Contents(esp=esp, root=root, core=core))

    def _write_overlay(self, overlay: Path) -> None:
        (overlay / "boot/grub").mkdir(parents=True)
        (overlay / "etc").mkdir()
        assert self.built.kernel is not None
        assert self.built.initrd is not None
        shutil.copy(self.built.kernel, overlay / "boot/vmlinuz")
        shutil.copy(self.built.initrd, overlay / "boot/initrd.img")
        (overlay / "boot/grub/grub.cfg").write_text(self.menu("/boot"))
        (overlay / "etc/fstab").write_text(
            f"LABEL={LABEL} / ext4 defaults 0 1\nLABEL=UEFI /boot/efi vfat umask=0077 0 1\n"
        )
        for user, keys in self.keys.items():
            home = overlay / ("root" if user == "root" else f"home/{user}") / ".ssh"
            home.mkdir(parents=True)
            (home / "authorized_keys").write_text("".join(f"{key}\n" for key in keys))

    def menu(self, folder: str) -> str:
        """The configuration of GRUB, with the kernel in a folder of its partition."""
        append = f"root=/dev/vda1 rw console=tty0 console=ttyS0 {self.append}"
        return menu(f"{folder}/vmlinuz", f"{folder}/initrd.img", append)


def signed_chain(config: str) -> dict[str, Path | bytes]:
    """The files of an EFI system partition that Secure Boot accepts, from Debian's signed packages."""
    return {
        _BOOTX64: Path("/usr/lib/shim/shimx64.efi.signed"),
        "EFI/BOOT/grubx64.efi": _GRUB / "x86_64-efi-signed/grubx64.efi.signed",
        "EFI/debian/grub.cfg": config.encode(),
    }


# -- as an image -----------------------------------------------------------------------------------


def define(
    folder: Path,
    *,
    firmware: str = "uefi",
    init: str = "busybox",
    size: str = "64MiB",
    more: str = "",
) -> ImageDefinition:
    """A definition of an image with such a disk. Its folder is the argument."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "disk.raw").touch()
    (folder / "image.toml").write_text(
        f"""\
schema = 1
description = "A disk as vendors lay it out"
architecture = "x86_64"
[source]
url = "disk.raw"
sha256 = "{"0" * 64}"
format = "raw"
[boot]
firmware = "{firmware}"
memory_min = "256MiB"
{more}
[disk]
size = "{size}"
[system]
python = {"false" if init == "busybox" else "true"}
init = "{init}"
user = "root"
[login]
method = "vagrant"
user = "root"
"""
    )
    return ImageDefinition.read(folder)


def image(
    definition: ImageDefinition, cache: Path, base: BuiltImage, key: KeyPair, disk: Path
) -> BuiltImage:
    """Keep a disk in the cache as a built image. Its guests are opened by a key.

    Args:
        base: the image that the disk was made from.
    """

    def make(work: Build) -> Mapping[str, object]:
        _run("cp", "--sparse=always", disk, work.out / DISK)
        shutil.copy(base.folder / HOST_KEY, work.out / HOST_KEY)
        key.save(work.out / "key")
        return {}

    return build(definition, ImageStore(cache), make, progress=lambda _: None, force=True)


def _copy_into(disk: Path, place: int, part: Path) -> None:
    _run(
        *("dd", f"if={part}", f"of={disk}", "bs=1M", f"seek={place // MIB}"),
        *("conv=notrunc,sparse", "status=none"),
    )


def _run(
    *argv: str | Path, given: bytes | None = None, env: Mapping[str, str] | None = None
) -> None:
    done = subprocess.run(
        [os.fspath(word) for word in argv],
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        env={**os.environ, "PATH": programs.search_path(), "LC_ALL": "C.UTF-8", **(env or {})},
        capture_output=True,
        check=False,
    )
    if done.returncode:
        output = (done.stdout + done.stderr).decode(errors="replace")
        raise RuntimeError(f"{argv[0]} ended with status {done.returncode}: {output}")
