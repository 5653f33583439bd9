"""What is read of archives, and what is not: tar, OVF, VMX, boxes and manifests of strangers."""

import hashlib
import json
import tarfile

import pytest

from pytest_vmsandbox.catalogue.importing import archives, ovf, tar
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.core.errors import ImageError
from support import disks
from support.disks import member, pax, raw_header, tar_of

END = bytes(1024)
DISK = b"a disk"
HUGE = pax("size", "9" * 19)
SECOND_DISK = b'{"provider": "libvirt", "disks": [{"path": "a.img"}, {"path": "%s"}]}'
OTHER_MANIFEST = b"SHA256(ubuntu.ovf)= " + b"1" * 64 + b"\nSHA256(a.vmdk)= %s\n"
LIBVIRT = {"metadata.json": b'{"provider": "libvirt"}', "box.img": DISK}


def read(folder, data):
    (folder / "file").write_bytes(data)
    members = folder / "members"
    members.mkdir()
    with opened(folder / "file") as file:
        return file, archives.read(file, members)


def chosen(folder, contents, kind):
    file, archive = read(folder, disks.tar(contents))
    return archives.choose(file, archive, kind)


# -- tar --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_plain_members_of_each_dialect(form, tmp_path):
    long = "x" * 150 + ".vmdk" if form != tarfile.USTAR_FORMAT else "x.vmdk"
    files = {"./a.img": DISK, long: b"b" * 1000, "ö.raw": b"", "Vagrantfile": b"exit"}
    _, archive = read(tmp_path, disks.tar(files, format=form))
    found = {name: path.read_bytes() for name, path in archive.disks.items()}
    assert found == {"a.img": DISK, long: b"b" * 1000, "ö.raw": b""}
    assert archive.texts == {}  # a Vagrantfile is never read


def test_holes_stay_holes(tmp_path):
    _, archive = read(tmp_path, disks.tar({"a.img": bytes(4 << 20) + DISK}))
    path = archive.disks["a.img"]
    assert path.read_bytes() == bytes(4 << 20) + DISK
    assert path.stat().st_blocks * 512 < 2 << 20


HARMFUL = {
    "a path": (lambda: disks.tar({"../secret.img": DISK}), "with a path or a strange name"),
    "a root": (lambda: disks.tar({"/etc/passwd": DISK}), "with a path or a strange name"),
    "a folder in between": (lambda: disks.tar({"a/b.img": DISK}), "with a path or a strange name"),
    "dots in between": (
        lambda: disks.tar({"include/../a.img": DISK}),
        "with a path or a strange name",
    ),
    "two dots": (lambda: disks.tar({"..": DISK}), "with a path or a strange name"),
    "a backslash": (lambda: disks.tar({"a\\b.img": DISK}), "with a path or a strange name"),
    "a line end": (lambda: disks.tar({"a\n.img": DISK}), "with a path or a strange name"),
    "an escape": (lambda: disks.tar({"\x1b[2J.img": DISK}), "with a path or a strange name"),
    "not UTF-8": (lambda: raw_header(b"\xff.img", b"00000000000") + END, "strange name"),
    "a NUL": (lambda: raw_header(b"a\0../b.img", b"00000000000") + END, "goes on behind its end"),
    "a link": (
        lambda: tar_of(member("box.img", tarfile.SYMTYPE, linkname="/etc/passwd")),
        "is a link",
    ),
    "a hard link": (
        lambda: tar_of(member("box.img", tarfile.LNKTYPE, linkname="/etc/passwd")),
        "is a link",
    ),
    "a device": (lambda: tar_of(member("box.img", tarfile.BLKTYPE)), "is a device"),
    "a FIFO": (lambda: tar_of(member("box.img", tarfile.FIFOTYPE)), "is a FIFO"),
    "a sparse member": (
        lambda: raw_header(b"box.img", b"00000000000", b"S") + END,
        "is a sparse file",
    ),
    "an unknown member": (
        lambda: raw_header(b"box.img", b"00000000000", b"Z") + END,
        "something unknown",
    ),
    "sparse by pax": (
        lambda: raw_header(b"x", b"%011o" % 25, b"x", pax("GNU.sparse.major", "1").ljust(25)) + END,
        "is a sparse file",
    ),
    "a folder above": (
        lambda: tar_of(member("../..", tarfile.DIRTYPE)),
        "with a path or a strange name",
    ),
    "twice": (lambda: tar_of(member("a.img"), member("a.img")), "is there twice"),
    "twice by dots": (lambda: tar_of(member("a.img"), member("./a.img")), "is there twice"),
    "a negative size": (lambda: raw_header(b"a.img", b"\xff" * 12) + END, "a negative size"),
    "a huge size": (lambda: raw_header(b"a.img", b"\x80" + b"\x7f" * 11) + END, "too large"),
    "a huge size by pax": (
        lambda: (
            raw_header(b"x", b"%011o" % len(HUGE), b"x", HUGE)
            + raw_header(b"a.img", b"00000000000")
            + END
        ),
        "too large",
    ),
    "a negative size by pax": (
        lambda: (
            raw_header(b"x", b"%011o" % len(pax("size", "-512")), b"x", pax("size", "-512"))
            + raw_header(b"a.img", b"00000000000")
        ),
        "a wrong size",
    ),
    "sizes for all": (
        lambda: raw_header(b"x", b"%011o" % len(pax("size", "9")), b"g", pax("size", "9")) + END,
        "for all of its members",
    ),
    "a pax record without an end": (
        lambda: raw_header(b"x", b"%011o" % 5, b"x", b"99 a=") + END,
        "wrong attributes",
    ),
    "a pax record of length 0": (
        lambda: raw_header(b"x", b"%011o" % 6, b"x", b"0 a=b\n") + END,
        "wrong attributes",
    ),
    "a pax header of a gigabyte": (
        lambda: raw_header(b"x", b"%011o" % (1 << 30), b"x"),
        "a header of 1073741824 bytes",
    ),
    "a name of a gigabyte": (
        lambda: raw_header(b"x", b"%011o" % (1 << 30), b"L"),
        "a header of 1073741824",
    ),
    "a wrong number": (lambda: raw_header(b"a.img", b"00000000x00") + END, "a wrong number"),
    "a wrong checksum": (lambda: b"b" + disks.tar({"a.img": DISK})[1:], "not its checksum"),
    "cut short": (lambda: disks.tar({"a.img": bytes(5000)})[:2000], "cut short"),
    "no end": (lambda: raw_header(b"a.img", b"00000000000"), "cut short"),
    "many members": (
        lambda: tar_of(*(member(f"{number}") for number in range(1025))),
        "more than 1024",
    ),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_archive_is_refused_with_its_own_error(name, tmp_path):
    make, why = HARMFUL[name]
    with pytest.raises(ImageError) as caught:
        read(tmp_path, make())
    assert why in caught.value.brief
    assert caught.value.remedy
    assert "\x1b" not in str(caught.value)
    assert {path.name for path in (tmp_path / "members").iterdir()} <= {"member-0000"}
    assert {path.name for path in tmp_path.iterdir()} == {"file", "members"}


def test_python_reads_what_we_pack(tmp_path):
    (tmp_path / "a.vmdk").write_bytes(DISK)
    (tmp_path / "b-flat.vmdk").write_bytes(bytes(513))
    with opened(tmp_path / "a.vmdk") as first, opened(tmp_path / "b-flat.vmdk") as second:
        archives.pack([first, second], tmp_path / "packed")
    with tarfile.open(tmp_path / "packed") as archive:
        found = {info.name: archive.extractfile(info).read() for info in archive}
    assert found == {"a.vmdk": DISK, "b-flat.vmdk": bytes(513)}
    assert tar.is_tar((tmp_path / "packed").read_bytes())


# -- which disk -------------------------------------------------------------------------------------


def test_of_several_disks_the_one_that_it_boots_from(tmp_path):
    files = {"box.ovf": disks.ovf("data.vmdk", "root.vmdk"), "data.vmdk": b"", "root.vmdk": b""}
    found = chosen(tmp_path, files, "ova")
    assert (found.name, found.left_out) == ("root.vmdk", ("data.vmdk",))


@pytest.mark.parametrize(
    ("more", "firmware"),
    [
        ('<vmw:Config vmw:key="firmware" vmw:value="efi"/>', "uefi"),
        ('<vmw:Config vmw:key="firmware" vmw:value="bios"/>', "bios"),
        ('<Firmware type="EFI64"/>', "uefi"),
        ("", ""),
    ],
)
def test_firmware_of_an_ova(more, firmware):
    assert ovf.read_ovf(disks.ovf("a.vmdk", more=more)).firmware == firmware


def test_a_vmx():
    text = b"""
.encoding = "UTF-8"
firmware = "efi"
sata0:0.present = "TRUE"
sata0:0.fileName = "second.vmdk"
scsi0:0.present = "TRUE"
scsi0:0.fileName = "first.vmdk"
scsi0:1.present = "FALSE"
scsi0:1.fileName = "gone.vmdk"
ide0:0.deviceType = "cdrom-image"
ide0:0.fileName = "cd.vmdk"
floppy0.fileName = "/dev/fd0"
"""
    assert ovf.read_vmx(text) == ovf.Machine(["first.vmdk", "second.vmdk"], "uefi")


LAUGHS = b"""<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><Envelope>&b;</Envelope>"""
OUTSIDE = b"""<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/passwd">]><Envelope>&a;</Envelope>"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "has a document type"),
        (OUTSIDE, "has a document type"),
        (b"<Envelope>" * 100 + b"</Envelope>" * 100, "too many elements"),
        (b"<Envelope>" + b"<a/>" * 30_000 + b"</Envelope>", "too many elements"),
        (b"no XML", "is no XML"),
        (b"<Envelope/>", "describes 0 machines"),
        (b'<?xml version="1.0" encoding="strange"?><a/>', "is no XML"),
        (disks.ovf("../a.vmdk"), "names a file with a path: '../a.vmdk'"),
        (disks.ovf("/etc/passwd"), "names a file with a path"),
        (disks.ovf("..%2Fpasswd"), "names a file with a path"),
        (disks.ovf("http://example.org/a.vmdk"), "names a file with a path"),
        (disks.ovf("a.vmdk", attributes='ovf:compression="gzip"'), "is compressed"),
        (disks.ovf("a.vmdk", attributes='ovf:chunkSize="7"'), "in several pieces"),
        (disks.ovf("a.vmdk").replace(b'ovf:fileRef="f0"', b'ovf:fileRef="x"'), "has no file"),
        (
            disks.ovf("a.vmdk").replace(b"ovf:capacity", b'ovf:parentRef="d" ovf:capacity'),
            "differences",
        ),
    ],
)
def test_a_harmful_ovf(text, why):
    with pytest.raises(ImageError, match=why):
        ovf.read_ovf(text)


@pytest.mark.parametrize(
    ("files", "kind", "why"),
    [
        ({"a.vmdk": b""}, "ova", "has 0 files .ovf"),
        ({"a.ovf": b"", "b.ovf": b""}, "ova", "has 2 files .ovf"),
        ({"a.ovf": disks.ovf("a.vmdk")}, "ova", "does not have the disk 'a.vmdk'"),
        ({"a.ovf": disks.ovf()}, "ova", "a machine without a disk"),
        ({"metadata.json": b"[]"}, "box", "metadata.json that cannot be read"),
        ({"metadata.json": b"[" * 10_000}, "box", "metadata.json that cannot be read"),
        ({"metadata.json": b'{"provider": "hyperv"}'}, "box", "is a box for 'hyperv'"),
        ({"metadata.json": b'{"provider": ["libvirt"]}'}, "box", "is a box for"),
        ({"a.txt": b""}, "box", "is no box of a known kind"),
        (
            LIBVIRT | {"metadata.json": b'{"provider": "libvirt", "format": "ssh"}'},
            "box",
            "unknown format",
        ),
        (
            LIBVIRT
            | {"metadata.json": b'{"provider": "libvirt", "disks": [{"path": "/etc/passwd"}]}'},
            "box",
            "names a disk with a path",
        ),
        (
            {"metadata.json": SECOND_DISK % rb"\u001b]0;title\u0007b\nRemedy: c", "a.img": DISK},
            "box",
            "a path or a strange name",
        ),
        (
            {"metadata.json": SECOND_DISK % b"../b", "a.img": DISK},
            "box",
            "a path or a strange name",
        ),
        ({"metadata.json": SECOND_DISK % rb"\ud800", "a.img": DISK}, "box", "a strange name"),
        ({"metadata.json": b'{"provider": "libvirt"}'}, "box", "does not have the disk 'box.img'"),
        ({"x.vmx": b'scsi0:0.fileName = "/vmfs/a.vmdk"'}, "box", "names a disk with a path"),
        ({"a.vmdk": b"KDMV"}, "vmdk", "has 0 descriptors"),
        ({"a.ovf": disks.ovf("a.vmdk"), "a.vmdk": b"", "a.mf": b"hello"}, "ova", "wrong line"),
        (
            {"a.ovf": disks.ovf("a.vmdk"), "a.vmdk": b"", "a.mf": b""},
            "ova",
            "a manifest that does not list a.ovf",
        ),
        (
            {"box.ovf": disks.ovf("a.vmdk"), "a.vmdk": b"", "a.mf": OTHER_MANIFEST % (b"0" * 64)},
            "box",
            "a.vmdk does not have the digest of its manifest",
        ),
        (
            {
                "metadata.json": b'{"provider": "libvirt", "disks": [{"size": 2}, {"path": "a.img"}]}'
            },
            "box",
            "gives disk 1 no path",
        ),
        (
            {
                "metadata.json": b'{"provider": "libvirt", "disks": [{"path": "a.img"}, {"path": 5}]}'
            },
            "box",
            "gives disk 2 no path",
        ),
    ],
)
def test_an_archive_without_its_disk(files, kind, why, tmp_path):
    with pytest.raises(ImageError, match=why) as caught:
        chosen(tmp_path, files, kind)
    assert caught.value.remedy
    assert str(caught.value).isascii()
    assert "\x1b" not in str(caught.value)


def test_a_box_with_the_manifest_of_the_ova_that_it_was_made_of(tmp_path):
    """As Ubuntu's boxes for VirtualBox have it: the .ovf has another name there."""
    manifest = OTHER_MANIFEST % hashlib.sha256(DISK).hexdigest().encode()
    files = {"box.ovf": disks.ovf("a.vmdk"), "a.vmdk": DISK, "ubuntu.mf": manifest}
    assert chosen(tmp_path, files, "box").name == "a.vmdk"


def test_a_box_says_what_it_is(tmp_path):
    text = json.dumps({"provider": "libvirt", "format": "qcow2", "architecture": "arm64"}).encode()
    found = chosen(tmp_path, LIBVIRT | {"metadata.json": text}, "box")
    assert (found.format, found.architecture, found.provider) == ("qcow2", "aarch64", "libvirt")


def test_what_macos_adds_is_not_looked_at(tmp_path):
    files = {
        "._box.ovf": b"x",
        "box.ovf": disks.ovf("a%20b.vmdk"),
        "._a b.vmdk": b"",
        "a b.vmdk": DISK,
    }
    found = chosen(tmp_path, files, "box")
    assert found.name == "a b.vmdk"  # its name is part of a URL in the OVF


@pytest.mark.parametrize(
    "files", [{"a.ovf": bytes(5 << 20)}, {f"{number}.mf": b"" for number in range(17)}]
)
def test_descriptions_do_not_fill_the_memory(files, tmp_path):
    with pytest.raises(ImageError, match="more or larger descriptions"):
        read(tmp_path, disks.tar(files))


def test_an_old_box_of_virtualbox_has_no_metadata(tmp_path):
    files = {"box.ovf": disks.ovf("a.vmdk"), "a.vmdk": DISK}
    assert chosen(tmp_path, files, "box").provider == "virtualbox"
