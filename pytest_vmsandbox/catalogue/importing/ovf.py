"""What describes a machine in an archive: OVF (XML), VMX (lines), and the manifest with its digests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.parsers import expat

from pytest_vmsandbox.catalogue.importing.vmdk import is_plain
from pytest_vmsandbox.core.errors import ImageError

_MAX_DEPTH, _MAX_ELEMENTS, _MAX_TEXT = 64, 20_000, 10_000
_DISK_TYPE = "17"  # of a resource
_HOST_RESOURCE = re.compile(r"(?:ovf:)?/(disk|file)/(.+)")
_VMX_LINE = re.compile(r'\s*([\w:.\-]+)\s*=\s*"([^"]*)"\s*')
_VMX_DISK = re.compile(r"((scsi|sata|nvme|ide)(\d+):(\d+))\.filename")
_BUSES = ("scsi", "sata", "nvme", "ide")  # where a machine boots from first
_MANIFEST_LINE = re.compile(r"(SHA1|SHA256|SHA512)\s?\((.+)\)\s?=\s?([0-9A-Fa-f]+)")


@dataclass
class Machine:
    """What is known of a machine.

    Attributes:
        disks: the names of the files of its disks, the one that it boots from first.
        firmware: ``uefi``, ``bios``, or empty if it does not say.
    """

    disks: list[str] = field(default_factory=list)
    firmware: str = ""


@dataclass
class _Element:
    """An XML element. Names and attributes are without their name spaces."""

    name: str
    attributes: dict[str, str]
    children: list[_Element] = field(default_factory=list)
    text: str = ""

    def all(self, name: str) -> list[_Element]:
        """All elements of that name in it."""
        found = [self] if self.name == name else []
        return found + [deeper for child in self.children for deeper in child.all(name)]

    def value(self, name: str) -> str:
        """The text of its child of that name."""
        return next((child.text.strip() for child in self.children if child.name == name), "")


def _wrong(what: str, remedy: str = "") -> ImageError:
    return ImageError(
        what, remedy=remedy or "unpack the archive, and import the disk that is in it"
    )


# -- OVF --------------------------------------------------------------------------------------------


def read_ovf(data: bytes) -> Machine:
    """The machine that an OVF file describes.

    Raises:
        ImageError: it is no such file, or its disks are not plain files beside it.
    """
    root = _parsed(data)
    machines = root.all("VirtualSystem")
    if root.name != "Envelope" or len(machines) != 1:
        raise _wrong(f"the .ovf describes {len(machines)} machines instead of one")
    files = {each.attributes.get("id", ""): each for each in root.all("File")}
    disks: dict[str, str] = {}
    for section in root.all("DiskSection"):
        for disk in section.all("Disk"):
            reference = disk.attributes.get("fileRef")
            if disk.attributes.get("parentRef"):
                raise _wrong("a disk of the .ovf has only the differences to another one")
            if reference:  # an empty disk has no file
                disks[disk.attributes.get("diskId", "")] = _href(files.get(reference))
    return Machine(_in_order(machines[0], disks, files), _firmware(machines[0]))


def _href(reference: _Element | None) -> str:
    if reference is None:
        raise _wrong("a disk of the .ovf has no file")
    name = unquote(reference.attributes.get("href", ""))
    if not is_plain(name):
        raise _wrong(f"the .ovf names a file with a path: {name[:80]!r}")
    if reference.attributes.get("compression", "") not in ("", "identity"):
        raise _wrong(f"the .ovf says that {name} is compressed", "unpack it, and import the disk")
    if reference.attributes.get("chunkSize"):
        raise _wrong(f"{name} is in several pieces", "put the pieces together, and import the disk")
    return name


def _in_order(machine: _Element, disks: dict[str, str], files: dict[str, _Element]) -> list[str]:
    """The files of the disks, in the order of their places in the machine."""
    found = []
    for item in (*machine.all("Item"), *machine.all("StorageItem")):
        if item.value("ResourceType") != _DISK_TYPE:
            continue
        resource = _HOST_RESOURCE.fullmatch(item.value("HostResource"))
        if resource is None:
            continue
        if resource[1] == "file":
            name = _href(files.get(resource[2]))
        elif resource[2] in disks:
            name = disks[resource[2]]
        else:
            continue
        parent, place = (_int(item.value(key)) for key in ("Parent", "AddressOnParent"))
        found.append((parent, place, name))
    return list(dict.fromkeys([name for *_, name in sorted(found)] or disks.values()))


def _int(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _firmware(machine: _Element) -> str:
    for setting in (*machine.all("Config"), *machine.all("ExtraConfig")):
        if setting.attributes.get("key") == "firmware":
            return "uefi" if setting.attributes.get("value", "").lower() == "efi" else "bios"
    for setting in machine.all("Firmware"):  # VirtualBox
        if kind := setting.attributes.get("type", ""):
            return "uefi" if kind.upper().startswith("EFI") else "bios"
    return ""


def _parsed(data: bytes) -> _Element:
    """The tree of an XML file. It may have no document type, so there are no entities to expand."""
    top = _Element("", {})
    stack, count = [top], 0
    parser = expat.ParserCreate(namespace_separator=" ")

    def refuse(*_: object) -> None:
        raise _wrong("the .ovf has a document type, which no OVF needs and which can do harm")

    def begin(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > _MAX_ELEMENTS or len(stack) > _MAX_DEPTH:
            raise _wrong("the .ovf has too many elements")
        plain = {key.rpartition(" ")[2]: value for key, value in attributes.items()}
        element = _Element(name.rpartition(" ")[2], plain)
        stack[-1].children.append(element)
        stack.append(element)

    def end(_: str) -> None:
        stack.pop()

    def text(data: str) -> None:
        if len(stack[-1].text) < _MAX_TEXT:
            stack[-1].text += data

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = begin
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise _wrong(f"the .ovf is no XML: {error}") from error
    return top.children[0]


# -- VMX and manifests ------------------------------------------------------------------------------


def read_vmx(data: bytes) -> Machine:
    """The machine that a VMX file describes.

    Raises:
        ImageError: its disks are not plain files beside it.
    """
    values: dict[str, str] = {}
    for line in data.decode("utf-8", errors="replace").splitlines():
        if found := _VMX_LINE.fullmatch(line):
            values[found[1].lower()] = found[2]
    disks = []
    for key, name in values.items():
        place = _VMX_DISK.fullmatch(key)
        if place is None or values.get(f"{place[1]}.present", "true").lower() != "true":
            continue
        kind = values.get(f"{place[1]}.devicetype", "disk").lower()
        if "cdrom" in kind or not name.lower().endswith(".vmdk"):
            continue
        if not is_plain(name):
            raise _wrong(f"the .vmx names a disk with a path: {name[:80]!r}")
        disks.append((_BUSES.index(place[2]), int(place[3][:4]), int(place[4][:4]), name))
    firmware = values.get("firmware", "bios").lower()
    names = [name for *_, name in sorted(disks)]
    return Machine(names, "uefi" if firmware == "efi" else "bios")


def read_manifest(data: bytes) -> dict[str, tuple[str, str]]:
    """The digests in a manifest: kind and hex, by the names of files.

    Raises:
        ImageError: a line has another form, or a file is there twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for line in data.decode("utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        entry = _MANIFEST_LINE.fullmatch(line.strip())
        if entry is None or entry[2] in found:
            raise _wrong(f"the manifest has a wrong line: {line[:80]!r}")
        found[entry[2]] = entry[1].lower(), entry[3].lower()
    return found
