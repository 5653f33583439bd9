"""Disk images and archives to import: good ones of each format, and what strangers could send."""

from __future__ import annotations

import functools
import io
import json
import random
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
SECRET = b"HOST-SECRET-" + b"s3cr3t" * 100  # the content of a file of this machine
GOOD = {  # name → format, options, whether to compress
    "qcow2-v2": ("qcow2", "compat=0.10", False),
    "qcow2-v3": ("qcow2", "compat=1.1", False),
    "qcow2-compressed": ("qcow2", "compat=1.1", True),
    "qcow2-zstd": ("qcow2", "compression_type=zstd", True),
    "qcow2-extended": ("qcow2", "extended_l2=on", False),
    "raw": ("raw", "", False),
    "vmdk-sparse": ("vmdk", "subformat=monolithicSparse", False),
    "vmdk-stream": ("vmdk", "subformat=streamOptimized", False),
    "vmdk-flat": ("vmdk", "subformat=monolithicFlat", False),
    "vmdk-split": ("vmdk", "subformat=twoGbMaxExtentSparse", False),
    "vmdk-split-flat": ("vmdk", "subformat=twoGbMaxExtentFlat", False),
    "vdi": ("vdi", "", False),
    "vdi-static": ("vdi", "static=on", False),
    "vhdx": ("vhdx", "subformat=dynamic", False),
    "vhdx-fixed": ("vhdx", "subformat=fixed", False),
    "vpc": ("vpc", "subformat=dynamic", False),
    "vpc-fixed": ("vpc", "subformat=fixed", False),
    "vpc-exact": ("vpc", "subformat=dynamic,force_size=on", False),
}


@functools.cache
def content() -> bytes:
    """A disk with a partition table, data and holes."""
    source = random.Random(12)
    disk = bytearray(3 * MIB)
    disk[4096:8192] = source.randbytes(4096)
    disk[2 * MIB : 2 * MIB + 70_000] = source.randbytes(70_000)
    disk[-512:] = b"the last sector".ljust(512, b".")
    disk[510:512] = b"\x55\xaa"
    return bytes(disk)


@functools.cache
def made(name: str) -> dict[str, bytes]:
    """The files of a good image, by name. The first one is the image."""
    kind, options, compressed = GOOD[name]
    with tempfile.TemporaryDirectory() as folder:
        raw, image = Path(folder, "raw"), Path(folder, "out", f"disk.{kind}")
        raw.write_bytes(content())
        image.parent.mkdir()
        more = [*(["-o", options] if options else []), *(["-c"] if compressed else [])]
        argv = ["qemu-img", "convert", "-f", "raw", "-O", kind, *more, str(raw), str(image)]
        subprocess.run(argv, check=True)
        others = sorted(path for path in image.parent.iterdir() if path != image)
        return {path.name: path.read_bytes() for path in (image, *others)}


def image(name: str) -> bytes:
    """A good image of one file."""
    return next(iter(made(name).values()))


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """`data` with some bytes changed: where, and what is there then."""
    new = bytearray(data)
    for at, what in changes:
        new[at : at + len(what)] = what
    return bytes(new)


def be(number: int, length: int) -> bytes:
    """A number, the largest byte first."""
    return number.to_bytes(length, "big")


def le(number: int, length: int) -> bytes:
    """A number, the smallest byte first."""
    return number.to_bytes(length, "little")


def with_vpc_sum(data: bytes, at: int, length: int, field: int) -> bytes:
    """`data` with the checksum of a header of a VHD image put right."""
    header = patched(data[at : at + length], (field, bytes(4)))
    return patched(data, (at + field, be(~sum(header) & 0xFFFFFFFF, 4)))


def descriptor(
    *extents: str, kind: str = "monolithicFlat", parent: str = "ffffffff", more: str = ""
) -> bytes:
    """A descriptor of a VMDK disk."""
    lines = "\n".join(extents)
    return (
        f'# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID={parent}\ncreateType="{kind}"\n{more}'
        f'# Extent description\n{lines}\n# The Disk Data Base\n#DDB\nddb.adapterType = "ide"\n'
    ).encode()


def sparse_vmdk(text: bytes) -> bytes:
    """A good sparse VMDK image with another descriptor inside."""
    return patched(image("vmdk-sparse"), (512, text.ljust(20 * 512, b"\0")))


def with_footer(change: tuple[int, bytes] = (0, b"")) -> bytes:
    """A VMDK image whose header names its grain directory at the end, as VMware streams it."""
    data = image("vmdk-stream")
    header = data[:512]
    marker = bytes(12) + le(3, 4) + bytes(496)
    data = patched(data, (56, le((1 << 64) - 1, 8)))
    return data + marker + patched(header, change) + bytes(512)


# -- archives ---------------------------------------------------------------------------------------

OVF = """<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="r" xmlns:vmw="v">
 <References>{files}</References>
 <DiskSection><Info/>{disks}</DiskSection>
 <VirtualSystem ovf:id="vm"><VirtualHardwareSection>{items}{more}</VirtualHardwareSection></VirtualSystem>
</Envelope>"""


def ovf(*names: str, more: str = "", attributes: str = "") -> bytes:
    """An OVF file of a machine with those disks, the last one in the first place."""
    places = list(enumerate(names))
    return OVF.format(
        files="".join(
            f'<File ovf:id="f{n}" ovf:href="{name}" {attributes}/>' for n, name in places
        ),
        disks="".join(
            f'<Disk ovf:diskId="d{n}" ovf:fileRef="f{n}" ovf:capacity="3"/>' for n, _ in places
        ),
        items="".join(
            f"<Item><rasd:AddressOnParent>{len(names) - n}</rasd:AddressOnParent>"
            f"<rasd:HostResource>ovf:/disk/d{n}</rasd:HostResource><rasd:Parent>3</rasd:Parent>"
            "<rasd:ResourceType>17</rasd:ResourceType></Item>"
            for n, _ in places
        ),
        more=more,
    ).encode()


def tar(files: dict[str, bytes], mode: Any = "w", **how) -> bytes:
    """A tar archive of plain files, made by Python."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **how) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def tar_of(*members: tarfile.TarInfo, data: bytes = b"") -> bytes:
    """A tar archive with members as they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **values) -> tarfile.TarInfo:
    """A member of an archive."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def ova(disk: bytes | None = None, manifest: bytes = b"") -> bytes:
    """An OVA with one disk."""
    files = {"box.ovf": ovf("disk1.vmdk")} | ({"box.mf": manifest} if manifest else {})
    return tar({**files, "disk1.vmdk": image("vmdk-stream") if disk is None else disk})


def box(provider: str, **metadata) -> dict[str, bytes]:
    """The files of a box of Vagrant."""
    files = {
        "Vagrantfile": b"raise 'a Vagrantfile was read'",
        "metadata.json": json.dumps({"provider": provider, **metadata}).encode(),
    }
    if provider == "libvirt":
        return files | {"box.img": image("qcow2-v3")}
    if provider == "virtualbox":
        return files | {
            "box.ovf": ovf("box-disk001.vmdk"),
            "box-disk001.vmdk": image("vmdk-stream"),
        }
    parts = made("vmdk-split")
    vmx = 'scsi0:0.present = "TRUE"\nscsi0:0.fileName = "disk.vmdk"\nide0:0.deviceType = "cdrom-image"\n'
    return (
        files
        | {"machine.vmx": f'{vmx}ide0:0.fileName = "x.iso"\nfirmware = "efi"\n'.encode()}
        | parts
    )


def pax(key: str, value: str) -> bytes:
    """A record of a pax header."""
    body = f" {key}={value}\n"
    length = len(body) + 1
    while len(f"{length}{body}") != length:
        length += 1
    return f"{length}{body}".encode()


def raw_header(name: bytes, size: bytes, kind: bytes = b"0", data: bytes = b"") -> bytes:
    """A member of a tar archive with any bytes as its size."""
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = size.ljust(12, b"\0")
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)
