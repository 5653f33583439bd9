"""Files that look like kernels, for tests that boot none."""

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "none": bytes,
}
GOOD = """\
CONFIG_BLK_DEV_INITRD=y
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=y
CONFIG_PROC_FS=y
CONFIG_SYSFS=y
CONFIG_DEVTMPFS=y
CONFIG_TMPFS=y
CONFIG_SIGNALFD=y
CONFIG_UNIX=y
CONFIG_INET=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_VIRTIO_PCI=m
CONFIG_VIRTIO_CONSOLE=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_BLK=y
CONFIG_EXT4_FS=m
CONFIG_CGROUPS=y
CONFIG_EPOLL=y
CONFIG_FHANDLE=y
CONFIG_INOTIFY_USER=y
CONFIG_TIMERFD=y
"""


def bzimage(release="6.12.9", *, config="", pack="gzip", bits64=True, protocol=0x20F) -> bytes:
    """What begins like a bzImage.

    Args:
        config: in the kernel, as with CONFIG_IKCONFIG; or empty.
        pack: how the kernel is compressed.
    """
    head = bytearray(0x1000)
    head[0x1F1] = 7  # sectors after the first one: the kernel begins at 0x1000
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    head[0x211] = 1  # it is loaded high
    struct.pack_into("<H", head, 0x20E, 0x400 - 0x200)
    struct.pack_into("<H", head, 0x236, int(bits64))
    version = f"{release} (me@here) #1 SMP\0".encode()
    head[0x400 : 0x400 + len(version)] = version
    inner = b"code" * 8
    if config:
        inner += b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED"
    payload = PACK[pack](inner)
    struct.pack_into("<II", head, 0x248, 0x20, len(payload))
    struct.pack_into("<I", head, 0x1F4, -(-(0x20 + len(payload)) // 16))
    return bytes(head) + bytes(0x20) + payload + b"what follows, and fills it up"


def package(file: Path, size=100) -> Path:
    """Write what looks like a Debian package, with one member."""
    header = b"debian-binary".ljust(48) + str(size).encode().ljust(10) + b"`\n"
    file.write_bytes(b"!<arch>\n" + header + bytes(size))
    return file


def kernel(file: Path, release="6.12.9", **how) -> Path:
    """Write one to a file, whose folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bzimage(release, **how))
    return file


def tree(folder: Path, release="6.12.9", *, config=GOOD, modules=()) -> Path:
    """A folder in which a kernel was built."""
    kernel(folder / "arch/x86/boot/bzImage", release)
    (folder / ".config").write_text(config)
    if modules:
        (folder / "modules.order").write_text("".join(f"{module}\n" for module in modules))
    for module in modules:
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / module).write_bytes(b"\x7fELF module")
    return folder


def installed(folder: Path, release="6.12.9", *, modules=("kernel/fs/ext4/ext4.ko",)) -> Path:
    """A folder like an unpacked package."""
    kernel(folder / f"boot/vmlinuz-{release}", release)
    at = folder / "lib/modules" / release
    for module in modules:
        (at / module).parent.mkdir(parents=True, exist_ok=True)
        (at / module).write_bytes(b"\x7fELF module")
    (at / "modules.order").write_text("\n".join(modules))
    return folder
