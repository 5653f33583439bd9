"""Feed damaged disk images and archives to the code that reads what strangers send.

``python tests/fuzz/disks.py --seconds 60`` goes on until something is found: an exception other than
`ImageError`, a file that takes more than two seconds, or a text that plays tricks on a terminal. The case that
led to it is named; ``--replay NUMBER`` runs it again. Each case is made from ``--seed`` and its number.

Bytes of good images of each format are changed, mostly in their headers, and read by the checks. Nothing is
converted, unless ``--convert`` says so: then what passes the checks goes through the jail, too, and nothing but
the disk may come out.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pytest_vmsandbox.catalogue.importing import checksums, compression, ovf
from pytest_vmsandbox.catalogue.importing.convert import convert
from pytest_vmsandbox.catalogue.importing.source import opened
from pytest_vmsandbox.catalogue.importing.unpacking import unpacked_disk
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.text import printable
from support import disks

SECONDS = 2.0  # for one file; the checks take some milliseconds
NUMBERS = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 64) - 1,
]
WORDS = [
    *(
        b"/etc/passwd",
        b"../",
        b"json:{",
        b"\0",
        b"\n",
        b"\r",
        b"\x1b[2J",
        b"parentFileNameHint",
        b"KDMV",
    ),
    *(
        b"createType",
        b'"',
        b"=",
        b"%s",
        b"\xff\xfe",
        b"<!DOCTYPE a>",
        b"&a;",
        b"99999999999999999999",
    ),
]
TEXTS = [  # read by functions of their own
    disks.ovf("a.vmdk", "b.vmdk"),
    disks.box("vmware_desktop")["machine.vmx"],
    b"SHA256(a.ovf)= " + b"a" * 64,
    b"SHA256 (a) = " + b"b" * 64 + b"\n" + b"c" * 128 + b" *a\n",
]
READERS = [
    ovf.read_ovf,
    ovf.read_vmx,
    ovf.read_manifest,
    lambda data: checksums.find(data.decode("latin-1"), "a", alone=False),
]
GOOD = [
    *map(disks.image, disks.GOOD),
    disks.with_footer(),
    disks.descriptor('RW 6144 FLAT "file" 0'),
    disks.ova(),
    *(disks.tar(disks.box(name)) for name in ("libvirt", "virtualbox", "vmware_desktop")),
    disks.tar(disks.box("libvirt"), "w:gz"),
    disks.tar({"box.img": bytes(5000), "metadata.json": b"{}"}, "w:xz"),
    disks.tar({"box.img": bytes(5000), "x" * 200: b""}, "w:bz2"),
]


class Found(Exception):
    """What we look for."""


def check(good: bool, otherwise: str) -> None:
    """Check something about a case."""
    if not good:
        raise Found(otherwise)


def hurt(data: bytes, chance: random.Random) -> bytes:
    """`data` with some of its bytes changed, most of them where headers are."""
    new = bytearray(data)
    places = [512, 1536, 4096, 70_000, 200_000, len(data)]
    for _ in range(chance.choice((1, 1, 2, 3, 8, 30))):
        at = chance.randrange(min(chance.choice(places), max(len(new), 1)))
        if chance.random() < 0.2:
            at = max(0, len(new) - 1 - at)  # footers
        kind = chance.randrange(6)
        if kind == 0:
            new[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            length = chance.choice((1, 2, 4, 8))
            number = chance.choice(NUMBERS) % (1 << 8 * length)
            new[at : at + length] = number.to_bytes(length, chance.choice(("big", "little")))
        elif kind == 2:
            word = chance.choice(WORDS)
            new[at : at + len(word)] = word
        elif kind == 3:
            new[at:at] = chance.choice(WORDS)
        elif kind == 4:
            new[at : at + chance.choice((1, 512, 4096))] = b""
        else:
            where = chance.randrange(max(len(new), 1))
            new[at : at + 64] = new[where : where + 64]
    return bytes(new)


def case(seed: int, number: int, folder: Path, *, to_convert: bool) -> str:
    """Run one case. Returns what became of it.

    Raises:
        Found: something is wrong.
    """
    chance = random.Random(seed << 32 | number)
    if chance.random() < 0.2:
        which = chance.randrange(len(TEXTS))
        text = hurt(TEXTS[which], chance)
        return outcome(lambda: READERS[which](text))
    data = hurt(chance.choice(GOOD), chance)
    (folder / "file").write_bytes(data)
    kind = chance.choice(("", "", "", *disks_kinds()))
    began = time.monotonic()

    def read() -> None:
        with (
            opened(folder / "file") as file,
            unpacked_disk(file, kind, folder / "work", lambda _: None) as found,
        ):
            if to_convert:
                convert(found.disk, folder / "out", folder / "work")
                check(
                    disks.SECRET not in (folder / "out").read_bytes(),
                    "a file of this machine is in it",
                )

    said = outcome(read)
    (folder / "out").unlink(missing_ok=True)
    took = time.monotonic() - began
    check(to_convert or took < SECONDS, f"it took {took:.1f} s")
    left = [path.name for path in (folder / "work").iterdir()]
    check(left == [], f"it left {left}")
    return said


def disks_kinds() -> list[str]:
    """The formats that a file can be said to have."""
    return ["qcow2", "raw", "vmdk", "vdi", "vhdx", "vpc", "ova", "box"]


def outcome(read) -> str:
    """What reading something ends with, in a word."""
    try:
        read()
    except ImageError as error:
        text = str(error)
        check(bool(error.remedy), f"no remedy: {text}")
        check(printable(text) == text, f"it plays tricks on a terminal: {text!r}")
        return "refused"
    return "accepted"


def main() -> int:
    """Run cases until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=int, metavar="NUMBER", help="only this case")
    parser.add_argument(
        "--convert", action="store_true", help="also convert what passes the checks"
    )
    args = parser.parse_args()
    compression.Limits.__init__.__defaults__ = (1 << 40, 250, 64 << 20)  # bombs end sooner
    counts: Counter[str] = Counter()
    end, number = time.monotonic() + args.seconds, args.replay or 0
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "work").mkdir()
        while time.monotonic() < end:
            try:
                counts[case(args.seed, number, Path(folder), to_convert=args.convert)] += 1
            except Exception:  # noqa: BLE001  # it is what we look for
                traceback.print_exc()
                print(f"found: --seed {args.seed} --replay {number}")
                return 1
            number += 1
            if args.replay is not None:
                break
    print(f"{number} cases from seed {args.seed}: {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
