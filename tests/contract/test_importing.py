"""Disks from elsewhere: good ones come out byte by byte, harmful ones are refused, and the jail is one."""

import ast
import bz2
import gzip
import hashlib
import lzma
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.importing import archives, compression, headers, jail
from pytest_vmsandbox.catalogue.importing.checked import CheckedDisk
from pytest_vmsandbox.catalogue.importing.convert import convert
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.catalogue.importing.unpacking import unpacked_disk
from pytest_vmsandbox.core.errors import ImageError
from support import disks
from support.disks import MIB, SECRET, be, image, le, made, patched

QCOW2, VMDK, VDI, VHDX, VPC = "qcow2-v3", "vmdk-sparse", "vdi", "vhdx", "vpc"
PIB = 1 << 50


@pytest.fixture
def work(tmp_path):
    """A folder for temporary files, which must be empty again after each test."""
    folder = tmp_path / "work"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@contextmanager
def files(folder, contents):
    with ExitStack() as stack:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        yield {name: stack.enter_context(opened(folder / name)) for name in contents}


def imported(folder, work, contents, kind=""):
    """What comes out of an image of some files, the first of which is the image."""
    with files(folder, contents) as there:
        first = next(iter(there.values()))
        checked = headers.check(first, kind or headers.detect(first), there)
        convert(checked, folder / "imported", work)
    return (folder / "imported").read_bytes()


def unpacked(folder, work, data, kind=""):
    """What comes out of one file, which may be compressed or an archive."""
    with (
        files(folder, {"file": data}) as there,
        unpacked_disk(there["file"], kind, work, lambda _: None) as found,
    ):
        assert found.kind == (kind or found.disk.format)
        convert(found.disk, folder / "imported", work)
    return (folder / "imported").read_bytes()


# -- good ones --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", disks.GOOD)
def test_a_good_image_comes_out_as_it_was(name, tmp_path, work):
    found = imported(tmp_path, work, made(name))
    wanted = disks.content()
    assert found[: len(wanted)] == wanted
    # The size of a VHD is rounded up to whole cylinders.
    assert not any(found[len(wanted) :])
    assert len(found) == len(wanted) or name in ("vpc", "vpc-fixed")
    assert (tmp_path / "imported").stat().st_blocks * 512 < len(wanted) / 2  # holes stay holes


def test_a_raw_disk_of_half_a_sector(tmp_path, work):
    data = disks.content()[:1000]
    assert imported(tmp_path, work, {"disk": data}) == data + bytes(24)


@pytest.mark.parametrize("maker", [b"vpc ", b"vbox", b"win ", b"qem2", b"wa\0\0"])
@pytest.mark.parametrize("name", ["vpc-exact", "vpc-fixed"])
def test_a_vhd_of_each_maker_has_all_of_its_disk(maker, name, tmp_path, work):
    """QEMU takes the size of some by their geometry."""
    data = patched(image(name), (len(image(name)) - 512 + 28, maker))
    data = disks.with_vpc_sum(data, len(data) - 512, 512, 64)
    if name == "vpc-exact":
        data = disks.with_vpc_sum(patched(data, (28, maker)), 0, 512, 64)
    found = imported(tmp_path, work, {"disk": data})
    whole = len(disks.content()) // (16 * 63 * 512) * 16 * 63 * 512
    assert found[:whole] == disks.content()[:whole]
    assert len(found) >= whole


def test_a_disk_of_many_files(tmp_path, work):
    """A split disk of 1 TiB has more than 500. Here each has a sector."""
    number = 700
    parts = {
        f"part-{place:03}.vmdk": disks.content()[512 * place :][:512] for place in range(number)
    }
    extents = [f'RW 1 FLAT "{name}" 0' for name in parts]
    text = disks.descriptor(*extents, kind="twoGbMaxExtentFlat")
    found = imported(tmp_path, work, {"disk.vmdk": text} | parts)
    assert found == disks.content()[: 512 * number]


@pytest.mark.parametrize("name", [VMDK, "vmdk-split-flat"])
def test_a_vmdk_whose_new_cid_is_shorter(name, tmp_path, work):
    """The end of the former text stays behind it."""
    contents = dict(made(name))
    before = contents["disk.vmdk"]
    start = before.index(b"# Disk DescriptorFile")
    old = before[start : before.index(b"\0", start)]
    new = re.sub(rb"\nCID=\w+", b"\nCID=a1", old, count=1) + b"\0"
    contents["disk.vmdk"] = patched(before, (start, new))
    assert imported(tmp_path, work, contents) == disks.content()


def test_a_vmdk_with_a_footer(tmp_path, work):
    assert imported(tmp_path, work, {"disk.vmdk": disks.with_footer()}) == disks.content()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, "zstd"])
@pytest.mark.parametrize("name", ["raw", "qcow2-v3"])
def test_compressed_as_a_whole(name, pack, tmp_path, work):
    if pack == "zstd":
        argv = ["zstd", "-c", "-q"]
        data = subprocess.run(argv, input=image(name), stdout=subprocess.PIPE, check=True).stdout
    else:
        half = len(image(name)) // 2  # several streams are one file
        data = pack(image(name)[:half]) + pack(image(name)[half:])
    assert unpacked(tmp_path, work, data) == disks.content()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (disks.ova, "ova"),
        (lambda: disks.tar(disks.box("libvirt", format="qcow2", virtual_size=1)), "box"),
        (lambda: disks.tar(disks.box("virtualbox"), "w:gz"), "box"),
        (lambda: disks.tar(disks.box("vmware_desktop"), "w:gz"), "box"),
        (
            lambda: disks.tar({f"./{k}": v for k, v in disks.box("libvirt").items()}, format=1),
            "box",
        ),
        (lambda: disks.tar(disks.box("libvirt") | {"include/_Vagrantfile": b"x"}, "w:xz"), "box"),
        (lambda: disks.tar(made("vmdk-split")), "vmdk"),
        (lambda: disks.tar(made("vmdk-flat"), "w:bz2"), "vmdk"),
        (lambda: disks.tar(disks.box("libvirt", disks=[{"path": "box.img"}]) | {"b": b""}), "box"),
    ],
    ids=["ova", "libvirt", "virtualbox", "vmware", "gnu", "include", "split", "flat", "disks"],
)
def test_archives(data, kind, tmp_path, work):
    assert unpacked(tmp_path, work, data(), kind) == disks.content()


def test_what_an_archive_is_can_be_told(tmp_path, work):
    for number, (data, kind, firmware) in enumerate(
        [
            (disks.ova(), "ova", ""),
            (disks.tar(disks.box("libvirt")), "box", ""),
            (disks.tar(disks.box("vmware_fusion"), "w:gz"), "box", "uefi"),
            (disks.tar(made("vmdk-flat")), "vmdk", ""),
        ]
    ):
        with (
            files(tmp_path, {f"file{number}": data}) as there,
            unpacked_disk(there[f"file{number}"], "", work, lambda _: None) as found,
        ):
            assert (found.kind, found.firmware) == (kind, firmware)


# -- harmful ones -----------------------------------------------------------------------------------


def qcow2(*changes, name=QCOW2):
    return lambda: {"disk.qcow2": patched(image(name), *changes)}


def l1(data):
    """Where the L1 table is, and its first entry."""
    at = int.from_bytes(data[40:48], "big")
    return at, data[at : at + 8]


def twice_the_same_l2():
    data = patched(image(QCOW2), (24, be(2 * 512 * MIB, 8)), (36, be(2, 4)))
    at, first = l1(data)
    return {"disk.qcow2": patched(data, (at + 8, first))}


def l2_in_the_l1():
    at, _ = l1(image(QCOW2))
    return {"disk.qcow2": patched(image(QCOW2), (at, be(at, 8)))}


def extension(kind, data):
    return qcow2((112, be(kind, 4) + be(len(data), 4) + data))


def vmdk(text):
    return lambda: {"disk.vmdk": disks.sparse_vmdk(text)}


def text(*extents, **how):
    return lambda: {"disk.vmdk": disks.descriptor(*extents, **how), "flat": bytes(MIB)}


GOOD_EXTENT = f'RW {3 * MIB // 512} SPARSE "disk.vmdk"'
SPARSE = "monolithicSparse"
FLAT = f'RW {MIB // 512} FLAT "flat" 0'


def vhdx_table(at, what):
    """The metadata of a VHDX image with an entry changed, which has no checksum."""

    def change():
        data = image(VHDX)
        start = data.index(b"metadata")
        return {"disk.vhdx": patched(data, (start + at, what))}

    return change


def vhdx_item(name, what, at=0):
    def change():
        data = image(VHDX)
        start = data.index(b"metadata")
        entry = data.index(name.bytes_le, start)
        offset = int.from_bytes(data[entry + 16 : entry + 20], "little")
        return {"disk.vhdx": patched(data, (start + offset + at, what))}

    return change


def vhdx_header(at, what):
    from pytest_vmsandbox.catalogue.importing import vhdx

    def change():
        data = image(VHDX)
        for start in (64 * 1024, 128 * 1024):
            header = patched(data[start : start + 4096], (at, what), (4, bytes(4)))
            data = patched(data, (start, patched(header, (4, le(vhdx._crc32c(header), 4)))))
        return {"disk.vhdx": data}

    return change


def vpc(*changes, header=False):
    def change():
        data = patched(image(VPC), *changes)
        data = disks.with_vpc_sum(data, 0, 512, 64)
        return {"disk.vpc": disks.with_vpc_sum(data, 512, 1024, 36) if header else data}

    return change


def parameters():
    from pytest_vmsandbox.catalogue.importing import vhdx

    return vhdx._PARAMETERS, vhdx._SIZE


PARAMETERS, SIZE = parameters()
HARMFUL = {
    # qcow2
    "a backing file": (qcow2((8, be(1024, 8) + be(11, 4)), (1024, b"/etc/passwd")), "backing file"),
    "a json backing": (
        qcow2((8, be(1024, 8) + be(40, 4)), (1024, b'json:{"driver":"nbd","host":"127.0.0.1"}')),
        "backing file",
    ),
    "a backing offset only": (qcow2((8, be(1024, 8))), "backing file"),
    "an external data file": (qcow2((72, be(4, 8))), "its data in another file"),
    "a data file's name": (
        extension(0x44415441, b"/etc/passwd\0\0\0\0\0"),
        "another file for its data",
    ),
    "a backing format": (extension(0xE2792ACA, b"raw\0\0\0\0\0"), "format of a backing file"),
    "an unknown extension": (extension(0x12345678, bytes(8)), "unknown header extension"),
    "a long extension": (
        qcow2((112, be(0x6803F857, 4) + be(1 << 30, 4))),
        "a header extension goes beyond",
    ),
    "unknown features": (qcow2((72, be(1 << 40, 8))), "unknown features (0x10000000000)"),
    "an unclean end": (qcow2((72, be(1, 8))), "not closed properly"),
    "a corrupt image": (qcow2((72, be(2, 8))), "not closed properly"),
    "encryption": (qcow2((32, be(2, 4))), "is encrypted"),
    "snapshots": (qcow2((60, be(3, 4))), "snapshots inside"),
    "a disk of 1 PiB": (qcow2((24, be(PIB, 8))), "holds a disk of 1024TiB"),
    "no disk": (qcow2((24, be(0, 8))), "a disk of 0 bytes"),
    "clusters of an exabyte": (qcow2((20, be(60, 4))), "clusters of 2^60"),
    "an L1 table outside": (qcow2((40, be(1 << 62, 8))), "L1 table lies outside"),
    "an overflowing offset": (qcow2((40, be((1 << 64) - 65536, 8))), "L1 table lies outside"),
    "a huge L1 table": (qcow2((36, be((1 << 32) - 1, 4))), "an L1 table of 4294967295 entries"),
    "an L2 table twice": (twice_the_same_l2, "an L2 table that is used twice"),
    "an L2 table in the L1": (l2_in_the_l1, "tables that overlap"),
    "an old version": (qcow2((4, be(1, 4))), "unknown version 1"),
    "cut short": (lambda: {"disk.qcow2": image(QCOW2)[:60]}, "cut short"),
    # VMDK
    "an extent of the host": (
        text('RW 1 FLAT "/etc/passwd" 0'),
        "an extent with a path: '/etc/passwd'",
    ),
    "an extent above": (text('RW 1 FLAT "../secret" 0'), "an extent with a path"),
    "an extent by URL": (text('RW 1 FLAT "nbd:127.0.0.1:10809" 0'), "an extent with a path"),
    "an extent of two dots": (text('RW 1 FLAT ".." 0'), "an extent with a path"),
    "an extent by json": (text('RW 1 FLAT "json:{}" 0'), "an extent with a path"),
    "an extent that is not given": (text('RW 1 FLAT "other.vmdk" 0'), "missing: other.vmdk"),
    "an extent that is itself": (text('RW 1 FLAT "disk.vmdk" 0'), "missing: disk.vmdk"),
    "an extent beyond its file": (text('RW 9999 FLAT "flat" 0'), "the disk lies outside"),
    "an extent from afar": (text('RW 1 FLAT "flat" 99999999999'), "the disk lies outside"),
    "a large extent": (text('RW 99999999999999999999 FLAT "flat" 0'), "unknown line"),
    "a negative extent": (text('RW -1 FLAT "flat" 0'), "unknown line"),
    "an extent of zeros": (text("RW 1 ZERO"), "an extent of the kind RW ZERO"),
    "a sparse extent that is flat": (text('RW 1 SPARSE "flat"'), "is not the part"),
    "a device": (text('RW 1 FLAT "flat" 0', kind="fullDevice"), "the kind 'fullDevice'"),
    "a snapshot's chain": (text(FLAT, parent="12345678"), "names a parent"),
    "a parent's name": (text(FLAT, more='parentFileNameHint="/etc/passwd"\n'), "names a parent"),
    "a parent in a comment": (
        text(FLAT, more="#parentFileNameHint=/etc/passwd\n"),
        "names a parent",
    ),
    "two kinds": (text(FLAT, more='createType="vmfs"\n'), "the key 'createType' twice"),
    "a kind in a comment": (
        text(FLAT, more='#createType="vmfs"\n'),
        "must have the key createType once",
    ),
    "two parents": (text(FLAT, more="parentCID=ffffffff\n"), "the key 'parentCID' twice"),
    "a tracking file": (
        text(FLAT, more='changeTrackPath="/etc/x"\n'),
        "unknown key 'changeTrackPath'",
    ),
    "a strange line": (text(FLAT, more="hello world\n"), "unknown line 'hello world'"),
    "a return in a line": (text(FLAT, more='ddb.a = "\rRW 1"\n'), "cannot be printed"),
    "a NUL in a name": (text('RW 1 FLAT "fl\0at" 0'), "behind the end"),
    "a parent in a sparse one": (
        vmdk(disks.descriptor(GOOD_EXTENT, kind=SPARSE, parent="0")),
        "names a parent",
    ),
    "a file in a sparse one": (
        vmdk(disks.descriptor('RW 1 FLAT "/etc/passwd" 0', kind=SPARSE)),
        "an extent with a path",
    ),
    "another file in a sparse one": (
        vmdk(disks.descriptor('RW 1 FLAT "other" 0', kind=SPARSE)),
        "names other files",
    ),
    "two extents in a sparse one": (
        vmdk(disks.descriptor(GOOD_EXTENT, 'RW 1 SPARSE "other"', kind=SPARSE)),
        "names other files",
    ),
    "a text behind the NUL": (
        vmdk(disks.descriptor(GOOD_EXTENT, kind=SPARSE) + b"\0parentFileNameHint=/etc/passwd"),
        "text behind the end",
    ),
    "a descriptor behind a sparse header": (
        lambda: {
            "disk.vmdk": patched(
                disks.sparse_vmdk(disks.descriptor('RW 1 FLAT "/etc/passwd" 0')), (12, le(0, 8))
            )
        },
        "only a descriptor behind the header",
    ),
    "a descriptor elsewhere": (
        lambda: {"disk.vmdk": patched(image(VMDK), (28, le(2, 8)))},
        "its descriptor is not where it can be",
    ),
    "a negative descriptor": (
        lambda: {"disk.vmdk": patched(image(VMDK), (28, le((1 << 64) - 1, 8)))},
        "its descriptor lies outside",
    ),
    "a directory outside": (
        lambda: {"disk.vmdk": patched(image(VMDK), (56, le(1 << 50, 8)))},
        "the grain directory lies outside",
    ),
    "no footer": (
        lambda: {"disk.vmdk": patched(image(VMDK), (56, le((1 << 64) - 1, 8)))},
        "its footer is missing",
    ),
    "another footer": (
        lambda: {"disk.vmdk": disks.with_footer((12, le(0, 8)))},
        "a footer that differs",
    ),
    "a footer at its end": (
        lambda: {"disk.vmdk": disks.with_footer((56, le((1 << 64) - 1, 8)))},
        "a footer that differs",
    ),
    "grains of 1 TiB": (
        lambda: {"disk.vmdk": patched(image(VMDK), (20, le(1 << 31, 8)))},
        "grains of an unknown size",
    ),
    "a large VMDK": (
        lambda: {"disk.vmdk": patched(image(VMDK), (12, le(PIB // 512, 8)))},
        "holds a disk of 1024TiB",
    ),
    # VDI
    "a VDI difference": (
        lambda: {"d": patched(image(VDI), (0x4C, le(4, 4)))},
        "only the differences",
    ),
    "a VDI with a parent": (
        lambda: {"d": patched(image(VDI), (0x1B8, b"x" * 16))},
        "only the differences",
    ),
    "a VDI with a link": (
        lambda: {"d": patched(image(VDI), (0x1A8, b"x" * 16))},
        "only the differences",
    ),
    "a large VDI": (
        lambda: {"d": patched(image(VDI), (0x170, le(PIB, 8)))},
        "holds a disk of 1024TiB",
    ),
    "VDI blocks": (
        lambda: {"d": patched(image(VDI), (0x178, le(512, 4)))},
        "blocks of an unknown size",
    ),
    "a VDI map outside": (
        lambda: {"d": patched(image(VDI), (0x154, le(1 << 31, 4)))},
        "block map lies outside",
    ),
    "a VDI block twice": (
        lambda: {"d": patched(image(VDI), (0x200, le(0, 4) + le(0, 4)))},
        "used twice",
    ),
    "a VDI block outside": (
        lambda: {"d": patched(image(VDI), (0x200, le(1000, 4)))},
        "used twice or are not",
    ),
    "a VDI of 2 blocks": (
        lambda: {"d": patched(image(VDI), (0x180, le(2, 4)))},
        "2 blocks for a disk",
    ),
    # VHDX
    "a VHDX parent": (vhdx_item(PARAMETERS, le(2, 4), at=4), "only the differences"),
    "a VHDX locator": (
        vhdx_table(32, bytes.fromhex("2d5fd3a80bb34d45abf7d3d84834ab0c")),
        "names a parent",
    ),
    "unknown metadata": (vhdx_table(32, b"x" * 16), "unknown metadata"),
    "too many metadata": (vhdx_table(10, b"\xff\xff"), "its metadata"),
    "metadata outside": (vhdx_table(48, le((1 << 32) - 1, 4)), "its metadata"),
    "a large VHDX": (vhdx_item(SIZE, le(PIB, 8)), "holds a disk of 1024TiB"),
    "VHDX blocks": (vhdx_item(PARAMETERS, le(1, 4)), "blocks of 1 bytes"),
    "a VHDX log": (vhdx_header(48, b"x" * 16), "changes wait in its log"),
    "a VHDX version": (vhdx_header(66, b"\2\0"), "an unknown version"),
    "VHDX headers": (
        lambda: {"d": patched(image(VHDX), (65536 + 5, b"xxx"), (131072 + 5, b"xxx"))},
        "none of its headers",
    ),
    "a VHDX region": (
        lambda: {"d": patched(image(VHDX), (192 * 1024 + 16, b"x"))},
        "two tables of regions",
    ),
    # VHD
    "a VHD difference": (vpc((60, be(4, 4))), "only the differences"),
    "a VHD parent": (
        vpc((512 + 64, b"/etc/passwd".decode().encode("utf-16-be")), header=True),
        "names a parent",
    ),
    "a VHD locator": (vpc((512 + 576, b"W2ku"), header=True), "names a parent"),
    "a VHD's parent's id": (vpc((512 + 40, b"x" * 16), header=True), "names a parent"),
    "a large VHD": (vpc((48, be(PIB, 8)), (28, b"win ")), "holds a disk of 1024TiB"),
    "a wrong checksum": (
        lambda: {"d": patched(image(VPC), (48, be(1, 8)))},
        "not have its checksum",
    ),
    "a VHD table": (
        vpc((512 + 28, be(1, 4)), (512 + 32, be(512, 4)), header=True),
        "a table of 1 blocks",
    ),
    "a VHD table outside": (
        vpc((512 + 16, be(1 << 62, 8)), header=True),
        "block table lies outside",
    ),
    "VHD blocks": (vpc((512 + 32, be(3, 4)), header=True), "blocks of 3 bytes"),
    # others
    "QED": (lambda: {"d": b"QED\0" + bytes(1024)}, "is a QED image"),
    "a page": (lambda: {"d": b"<!DOCTYPE html><title>404</title>" + bytes(1024)}, "is a page"),
    "LUKS": (lambda: {"d": b"LUKS\xba\xbe" + bytes(1024)}, "is encrypted"),
    "ZIP": (lambda: {"d": b"PK\3\4" + bytes(1024)}, "is a ZIP archive"),
    "a CD": (lambda: {"d": patched(bytes(40000), (32769, b"CD001"))}, "is a CD image"),
    "a CD that is a disk, too": (
        lambda: {"d": patched(bytes(40000), (32769, b"CD001"), (510, b"\x55\xaa"))},
        "is a CD image",
    ),
    "noise": (lambda: {"d": bytes(2048)}, "has no known beginning"),
    "nothing": (lambda: {"d": b""}, "has no known beginning"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_image_is_refused_with_its_own_error(name, tmp_path, work):
    contents, why = HARMFUL[name]
    with pytest.raises(ImageError) as caught:
        imported(tmp_path, work, contents())
    assert why in f"{caught.value.brief}\n{caught.value.remedy}"
    assert caught.value.remedy
    assert "root:" not in str(caught.value)
    assert not (tmp_path / "imported").exists()


# Each of these made a plain `qemu-img` write a file of this machine into its output, open a connection, or hang.
LEAKS = {
    "backing file": (
        "qcow2",
        lambda at: patched(image(QCOW2), (8, be(4096 * 16 - 512, 8) + be(len(at), 4)), (65024, at)),
    ),
    "data file": (
        "qcow2",
        lambda at: patched(
            image("qcow2-v3"), (72, be(4, 8)), (112, be(0x44415441, 4) + be(len(at), 4) + at)
        ),
    ),
    "flat extent": ("vmdk", lambda at: disks.descriptor(f'RW 1 FLAT "{at.decode()}" 0')),
    "flat extent behind a sparse header": (
        "vmdk",
        lambda at: patched(
            disks.sparse_vmdk(disks.descriptor(f'RW 1 FLAT "{at.decode()}" 0')), (12, le(0, 8))
        ),
    ),
    "parent": (
        "vmdk",
        lambda at: disks.sparse_vmdk(
            disks.descriptor(
                GOOD_EXTENT, kind=SPARSE, parent="0", more=f'parentFileNameHint="{at.decode()}"\n'
            )
        ),
    ),
    "raw that begins like qcow2": (
        "raw",
        lambda at: patched(image(QCOW2), (8, be(65024, 8) + be(len(at), 4)), (65024, at)),
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_in_the_jail_a_harmful_image_gets_nothing(name, tmp_path, work):
    """The second line of defence: even if the header were not checked."""
    kind, make = LEAKS[name]
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET + bytes(-len(SECRET) % 512))
    output = tmp_path / "imported"
    (tmp_path / "disk").write_bytes(make(os.fsencode(secret)))
    said = ""
    with opened(tmp_path / "disk") as file:
        try:
            convert(CheckedDisk(kind, 3 * MIB, file), output, work)
        except ImageError as error:
            said = str(error)
    assert SECRET[:12] not in output.read_bytes()
    assert "HOST-SECRET" not in said
    assert said or name == "raw that begins like qcow2"


# -- what is no plain file --------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)


def listening(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (fifo, "a FIFO"),
        (listening, "a socket"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.symlink_to("/etc/passwd"), "a link"),
        (lambda path: path.symlink_to("nowhere"), "a link"),
        (lambda path: path.symlink_to(path), "a link"),
        (lambda path: None, "it does not exist"),
    ],
)
def test_only_regular_files_are_opened(make, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    make(tmp_path / "disk")
    with pytest.raises(ImageError, match=why), opened(tmp_path / "disk"):
        pass


def test_devices_are_not_opened():
    with pytest.raises(ImageError, match="a device"), opened(Path("/dev/zero")):
        pass


def test_a_file_that_is_written_to_meanwhile(tmp_path, work):
    (tmp_path / "disk").write_bytes(image("raw"))
    with opened(tmp_path / "disk") as file:
        checked = headers.check(file, "raw")
        os.utime(tmp_path / "disk", ns=(1, 1))
        with pytest.raises(ImageError, match="was changed while it was imported"):
            convert(checked, tmp_path / "imported", work)


def test_a_file_that_is_replaced_after_its_header_was_checked(tmp_path, work):
    (tmp_path / "disk").write_bytes(image("raw"))
    (tmp_path / "other").write_bytes(SECRET)
    with opened(tmp_path / "disk") as file:
        checked = headers.check(file, "raw")
        os.replace(tmp_path / "other", tmp_path / "disk")
        with pytest.raises(ImageError, match="was replaced by another one"):
            convert(checked, tmp_path / "imported", work)
    assert SECRET not in (tmp_path / "imported").read_bytes()


def test_another_format_than_the_named_one(tmp_path, work):
    with pytest.raises(ImageError, match="is no vdi image: it begins as qcow2"):
        imported(tmp_path, work, made(QCOW2), "vdi")


def test_a_raw_disk_that_begins_like_another_format_is_named(tmp_path, work):
    data = patched(image("raw"), (0, image(QCOW2)[:512]), (40, be(1 << 60, 8)))
    with pytest.raises(ImageError, match="is damaged"):
        imported(tmp_path, work, {"disk": data})
    assert imported(tmp_path, work, {"disk": data}, "raw") == data


# -- the jail ---------------------------------------------------------------------------------------

LOOK = r"""
import os, socket
found = {
    "processes": os.path.exists("/proc/1"),
    "homes": os.path.exists("/home") or os.path.exists("/root"),
    "passwords": os.path.exists("/etc/passwd"),
    "devices": os.path.exists("/dev/null"),
    "root": sorted(set(os.listdir("/")) - {"bin", "lib", "lib32", "lib64", "libx32", "sbin", "usr"}),
    "etc": os.listdir("/etc"),
    "user": os.getuid(),
    "networks": [name for _, name in socket.if_nameindex()],
    "pid": os.getpid(),
}
for what, doing in {
    "connect": lambda: socket.create_connection(("127.0.0.1", PORT), 5),
    "unix": lambda: socket.socket(socket.AF_UNIX).connect("\0ABSTRACT"),
    "write to the input": lambda: open("/in/disk", "r+"),
    "write beside it": lambda: open("/in/other", "w"),
    "write to the root": lambda: open("/x", "w"),
    "write to programs": lambda: open("/usr/x", "w"),
    "mount": lambda: __import__("ctypes").CDLL(None, use_errno=True).mount(b"x", b"/in", b"tmpfs", 0, None) and os.open("/nothing", 0),
    "device": lambda: os.mknod("/out/device", 0o600 | 0o020000, os.makedev(1, 3)),
    "kill": lambda: os.kill(PID, 9),
    "write": lambda: open("/out/disk", "r+").write("written"),
}.items():
    try:
        doing()
        found[what] = "done"
    except OSError as error:
        found[what] = error.strerror
print(found)
"""


def in_jail(argv, work, *binds, **how):
    return jail.run(argv, binds, work=work, **{"seconds": 60, "file_size": MIB, **how})


def python(code):
    return ["/usr/bin/python3", "-I", "-S", "-c", code]


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_nothing_of_this_machine_is_in_the_jail(tmp_path, work, server):
    (tmp_path / "out").touch()
    name = f"vmsandbox-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as abstract, files(tmp_path, {"disk": b"content"}) as there:
        abstract.bind(f"\0{name}")
        abstract.listen()
        code = LOOK.replace("PORT", str(server.getsockname()[1])).replace("PID", str(os.getpid()))
        with opened(tmp_path / "out") as out:
            ended = in_jail(
                python(code.replace("ABSTRACT", name)),
                work,
                jail.Bind(there["disk"], "/in/disk"),
                jail.Bind(out, "/out/disk", writable=True),
            )
    assert ended.status == 0, ended.output
    found = ast.literal_eval(ended.output)
    assert found == {
        "processes": False,
        "homes": False,
        "passwords": False,
        "devices": False,
        "root": ["etc", "in", "out"],
        "etc": ["ld.so.cache"],
        "user": 65534,
        "networks": ["lo"],
        "pid": 1,
        "connect": "Network is unreachable",
        "unix": "Connection refused",
        "write to the input": "Read-only file system",
        "write beside it": "Read-only file system",
        "write to the root": "Read-only file system",
        "write to programs": "Read-only file system",
        "mount": found["mount"],
        "device": found["device"],
        "kill": "No such process",
        "write": "done",
    }
    assert found["mount"] != "done"
    assert found["device"] != "done"
    assert (tmp_path / "out").read_text() == "written"


CHANGE = (
    "test -w /usr && echo programs; test -w / && echo root; echo x >/in/disk; echo new >/out/disk"
)
STRANGE = {"not ASCII": b"\xc3\xa9", "not UTF-8": b"\xff", "special": b"a \\040\\xe9\t\n#b"}


@pytest.mark.parametrize("name", STRANGE)
def test_whatever_the_folder_is_called_the_jail_is_read_only(name, work):
    folder = work / os.fsdecode(STRANGE[name])
    folder.mkdir()
    contents = {"disk": b"old", "out": b""}
    with files(folder, contents) as there:
        ended = in_jail(
            ["/bin/sh", "-c", CHANGE],
            folder,
            jail.Bind(there["disk"], "/in/disk"),
            jail.Bind(there["out"], "/out/disk", writable=True),
        )
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    assert found == {"disk": b"old", "out": b"new\n"}
    assert "Read-only file system" in ended.output
    assert not {"programs", "root"} & set(ended.output.split())


@pytest.mark.parametrize(
    ("good", "bad", "why"),
    [
        ("        read_only(target)\n", "        pass\n", r"not read-only: '/"),
        ("MS_BIND | MS_RDONLY |", "MS_BIND |", r"not read-only: '/"),
        ("        mount(name, root + name, ", "        (name, root + name, ", r"is not mounted"),
        ("    mount(source, target, ", "    (source, target, ", r"is not mounted"),
    ],
)
def test_a_jail_that_is_not_read_only_is_never_used(good, bad, why, tmp_path, work, monkeypatch):
    text = Path(jail._CELL).read_text(encoding="utf-8")
    assert text.count(good) == 1
    (tmp_path / "cell.py").write_text(text.replace(good, bad))
    monkeypatch.setattr(jail, "_CELL", str(tmp_path / "cell.py"))
    with (
        files(tmp_path, {"disk": b"old"}) as there,
        pytest.raises(ImageError, match=why) as caught,
    ):
        in_jail(["/bin/echo", "it ran"], work, jail.Bind(there["disk"], "/in/disk"))
    assert "it ran" not in str(caught.value)


def test_a_program_in_the_jail_has_limits(tmp_path, work):
    with pytest.raises(ImageError, match="took more than 1 s"):
        in_jail(["/bin/sleep", "600"], work, seconds=1)
    (tmp_path / "out").touch()
    with opened(tmp_path / "out") as out:
        writes = "open('/out/x', 'r+b').write(bytes(2 << 20))"
        ended = in_jail(python(writes), work, jail.Bind(out, "/out/x", writable=True))
    assert "File too large" in ended.output
    assert (tmp_path / "out").stat().st_size <= MIB
    assert "MemoryError" in in_jail(python("bytes(5 << 30)"), work).output


def test_what_a_check_raises_ends_the_program(work):
    def check():
        raise ImageError("enough")

    with pytest.raises(ImageError, match="enough"):
        in_jail(["/usr/bin/yes"], work, check=check)


def test_it_ends_with_us(tmp_path, work):
    code = f"""
import sys
from pathlib import Path
from pytest_vmsandbox.catalogue.importing import jail
jail.run(["/bin/sh", "-c", "echo started >&3; exec sleep 600"], [], work=Path({str(work)!r}), seconds=600, file_size=1)
""".replace(">&3", ">&2")
    reading, writing = os.pipe()
    # The program in the jail holds the pipe: at its end of file, the program is gone.
    script = code.replace("file_size=1)", f"file_size=1, stdout={writing})").replace(">&2", "")
    with subprocess.Popen([sys.executable, "-c", script], pass_fds=(writing,)) as process:
        os.close(writing)
        assert os.read(reading, 100) == b"started\n"
        process.kill()
    assert os.read(reading, 100) == b""
    os.close(reading)
    for left in work.iterdir():
        left.rmdir()


def test_where_no_jail_is_allowed_nothing_runs(work, tmp_path, monkeypatch):
    (tmp_path / "cell.py").write_text(
        Path(jail._CELL)
        .read_text(encoding="utf-8")
        .replace("libc.unshare(NEW_NAME_SPACES)", "libc.unshare(-1)")
    )
    monkeypatch.setattr(jail, "_CELL", str(tmp_path / "cell.py"))
    with pytest.raises(ImageError, match=r"cannot run in a jail here: unshare") as caught:
        in_jail(["/bin/echo", "it ran"], work)
    assert "it ran" not in str(caught.value)
    assert "sysctl" in caught.value.remedy


def test_a_program_that_is_not_of_the_system(work, tmp_path):
    with pytest.raises(ImageError, match="not below /usr"):
        in_jail([str(tmp_path / "qemu-img")], work)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_has_the_jail_too(tmp_path):
    cell = Path(tempfile.mkdtemp()) / "cell.py"
    cell.parent.chmod(0o755)
    code = f"""
import os, shutil, sys, tempfile
from pathlib import Path
from pytest_vmsandbox.catalogue.importing import jail
cell = Path({str(cell)!r})
cell.write_text(Path(jail._CELL).read_text())
cell.chmod(0o644)
jail._CELL = str(cell)
sys.executable = "/usr/bin/python3"  # ours may be where only root can read it
os.setgroups([]); os.setgid(12345); os.setuid(12345)
with tempfile.TemporaryDirectory() as work:
    print(jail.run(["/usr/bin/id", "-u"], [], work=Path(work), seconds=60, file_size=1))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    shutil.rmtree(cell.parent)
    assert ended.stdout == "Ended(status=0, output='65534')\n", ended.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read files of other users")
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_files_of_other_users_are_not_read_for_root(closed, tmp_path, work):
    (tmp_path / "theirs").mkdir()
    file = tmp_path / "theirs" / "disk"
    file.write_bytes(image("raw"))
    at = file if closed == "file" else file.parent
    os.chown(at, 12345, 12345)
    at.chmod(0o700)
    with (
        opened(file) as there,
        pytest.raises(ImageError, match="cannot be read in the jail") as caught,
    ):
        convert(headers.check(there, "raw"), tmp_path / "imported", work)
    assert "copy it" in caught.value.remedy


# -- harmful archives -------------------------------------------------------------------------------


def refused_archive(folder, data, kind, limits=None):
    target = folder / "members"
    target.mkdir()
    with files(folder, {"file": data}) as there, pytest.raises(ImageError) as caught:  # noqa: PT012
        archive = archives.read(there["file"], target, limits)
        archives.choose(there["file"], archive, kind)
    assert caught.value.remedy
    return caught.value.brief


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb(pack, tmp_path):
    few = compression.Limits(ratio=10, grace=MIB)
    with (
        files(tmp_path, {"file": pack(bytes(8 * MIB))}) as there,
        pytest.raises(ImageError, match="was not unpacked further"),
    ):
        list(compression.unpacked(there["file"], few))
    bomb = disks.tar({"metadata.json": b"{}", "box.img": bytes(8 * MIB)})
    assert "was not unpacked further" in refused_archive(tmp_path, pack(bomb), "box", few)
    assert sum(path.stat().st_size for path in (tmp_path / "members").iterdir()) < 3 * MIB


def test_a_bomb_of_zstd(tmp_path, work, monkeypatch):
    monkeypatch.setattr(compression, "GRACE", MIB)
    data = subprocess.run(
        ["zstd", "-c", "-q"], input=bytes(64 * MIB), stdout=subprocess.PIPE, check=True
    )
    with pytest.raises(ImageError, match=r"cannot be unpacked|was not unpacked further"):
        unpacked(tmp_path, work, data.stdout)


def test_a_bomb_of_qcow2(tmp_path, work, monkeypatch):
    """All of its clusters are one, so it is small and its disk is large."""
    monkeypatch.setattr("pytest_vmsandbox.catalogue.importing.convert.GRACE", MIB)
    monkeypatch.setattr("pytest_vmsandbox.catalogue.importing.convert.RATIO", 1)
    with files(tmp_path, {"disk": many_times_one_cluster()}) as there:
        checked = headers.check(there["disk"], "qcow2")
        with pytest.raises(ImageError, match="was not unpacked further"):
            convert(checked, tmp_path / "imported", work)


def many_times_one_cluster():
    data = image(QCOW2)
    _, first = l1(data)
    l2 = int.from_bytes(first, "big") & 0x00FFFFFFFFFFFE00
    entry = data[l2 : l2 + 8]
    return patched(data, (24, be(512 * MIB, 8)), (l2, entry * 8192))


def test_a_truncated_compression(tmp_path, work):
    with pytest.raises(ImageError, match="cut short"):
        unpacked(tmp_path, work, gzip.compress(image("raw"))[:-20])
    with pytest.raises(ImageError, match="cannot be unpacked"):
        unpacked(tmp_path, work, gzip.compress(image("raw")) + b"something else")


def test_digests_of_a_manifest(tmp_path):
    good = hashlib.sha1(image("vmdk-stream")).hexdigest()
    text = hashlib.sha256(disks.ovf("disk1.vmdk")).hexdigest()
    lines = f"SHA256(box.ovf)= {text}\nSHA1(disk1.vmdk)= {good}\n"
    with files(tmp_path, {"file": disks.ova(manifest=lines.encode())}) as there:
        (tmp_path / "good").mkdir()
        archive = archives.read(there["file"], tmp_path / "good")
        assert archives.choose(there["file"], archive, "ova").name == "disk1.vmdk"
    wrong = lines.replace(good, "0" * 40)
    assert "not have the digest of its manifest" in refused_archive(
        tmp_path, disks.ova(manifest=wrong.encode()), "ova"
    )
