"""A kept guest as one file: what is written, and what is refused of strangers."""

from __future__ import annotations

import gzip
import io
import json
import stat
import tarfile
import time

import pytest

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.store import Entry, Kind, Store
from pytest_vmsandbox.core.errors import CacheError, ConfigError
from pytest_vmsandbox.core.spec import GIB
from pytest_vmsandbox.guests import exported

KIND = Kind(folder="things", record="thing.json", schema=7)
CONTENT = {"disk": b"d" * 5000, "state": bytes(range(256)) * 9, "image/kernel": b"k", "empty": b""}


@pytest.fixture
def entry(tmp_path):
    def fill(folder, _lock):
        (folder / "image").mkdir()
        for name, data in CONTENT.items():
            (folder / name).write_bytes(data)
        with (folder / "sparse").open("wb") as file:  # as a raw disk that is nearly empty
            file.seek(5 * GIB)
            file.write(b"middle")
            file.truncate(8 * GIB)
        return {"name": "tiny-1"}

    return Store(tmp_path / "cache", KIND, Entry).make("1", fill, on_busy=lambda: None)


@pytest.fixture
def file(tmp_path, entry):
    path = tmp_path / "export"
    with path.open("wb") as out:
        exported.write(entry, out)
    return path


def unpack(file, folder):
    folder.mkdir()
    with exported.read(file, KIND) as export:
        export.unpack(folder)
    return export


class TestBoth:
    def test_it_comes_back_as_it_was(self, file, entry, tmp_path):
        export = unpack(file, tmp_path / "new")
        assert export.record == entry.record
        assert integrity.damage(tmp_path / "new", entry.record["digests"]) == ""
        assert {name: (tmp_path / "new" / name).read_bytes() for name in CONTENT} == CONTENT
        assert not (tmp_path / "new" / "thing.json").exists()

    def test_it_is_for_this_user_only(self, file, tmp_path):
        unpack(file, tmp_path / "new")
        modes = {
            stat.S_IMODE(it.stat().st_mode) for it in (tmp_path / "new").rglob("*") if it.is_file()
        }
        assert modes == {0o600}
        assert stat.S_IMODE((tmp_path / "new" / "image").stat().st_mode) == 0o700

    def test_holes_take_no_room(self, file, entry, tmp_path):
        assert file.stat().st_size < 20_000
        assert unpack(file, tmp_path / "new").size < 2 << 20
        sparse = (tmp_path / "new" / "sparse").stat()
        assert (sparse.st_size, sparse.st_blocks < 4096) == (8 * GIB, True)

    def test_the_same_guest_gives_the_same_bytes(self, file, entry, monkeypatch):
        monkeypatch.setattr(time, "time", lambda: 1e9)
        out = io.BytesIO()
        exported.write(entry, out)
        assert out.getvalue() == file.read_bytes()

    def test_it_tells_how_far_it_is(self, entry, file, tmp_path):
        told = []
        exported.write(entry, io.BytesIO(), lambda *now: told.append(now))
        assert told == sorted(told)
        assert len(set(told)) > 3
        assert told[-1][0] == told[-1][1]


# -- files of strangers ---------------------------------------------------------------------------------

DIGEST = "0" * 64


def packed(members, end=b""):
    """A compressed archive of members: a name and bytes, or a `TarInfo`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if member.isreg():
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(out.getvalue() + end)


def texts(digests=None, rows=None, schema=7, form=1):
    """The record and the index of a file with one `x`."""
    digests = {"state": DIGEST} if digests is None else digests
    rows = [{"path": "state", "size": 1, "parts": [[0, 1]]}] if rows is None else rows
    record = {"schema": schema, "digests": digests}
    index = {"format": form, "files": rows}
    return [
        ("record.json", json.dumps(record).encode()),
        ("index.json", json.dumps(index).encode()),
    ]


def special(kind, name="000-state"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member, b""


def parts(*found, size=1):
    return texts(rows=[{"path": "state", "size": size, "parts": list(found)}])


REFUSED = {
    "no archive": (b"hello", "no tar archive|cut short"),
    "empty": (packed([]), "no record.json"),
    "no record": (packed([("state", b"x")]), "no record.json"),
    "no index": (packed(texts()[:1]), "no index.json"),
    "record is no object": (packed([("record.json", b"[1]")]), "cannot be read"),
    "deep record": (packed([("record.json", b"[" * 100_000)]), "cannot be read"),
    "other schema": (packed(texts(schema=8)), "another version"),
    "other format": (packed(texts(form=2)), "format 2"),
    "huge record": (packed([("record.json", bytes(17 << 20))]), "takes 17MiB"),
    "no files": (packed(texts(digests={})), "names no files"),
    "link": (packed([*texts(), special(tarfile.SYMTYPE)]), "a link"),
    "hard link": (packed([*texts(), special(tarfile.LNKTYPE)]), "a link"),
    "device": (packed([*texts(), special(tarfile.BLKTYPE)]), "a device"),
    "FIFO": (packed([*texts(), special(tarfile.FIFOTYPE)]), "a FIFO"),
    "path of a member": (packed([*texts(), ("../state", b"x")]), "path or a strange name"),
    "absolute member": (packed([*texts(), ("/etc/passwd", b"x")]), "path or a strange name"),
    "twice": (packed([*texts(), ("record.json", b"x")]), "twice"),
    "other member": (packed([*texts(), ("001-state", b"x")]), "in the place of state"),
    "longer member": (packed([*texts(), ("000-state", b"xy")]), "in the place of state"),
    "further file": (
        packed([*texts(digests={"state": "@"}), ("000-state", b"x"), ("more", b"x")]),
        "further file 'more'",
    ),
    "other content": (packed([*texts(), ("000-state", b"x")]), "not the digest"),
    "missing": (packed(texts()), "missing at its end"),
    "cut short": (packed([*texts(), ("000-state", b"x" * 99_999)])[:-60], "cut short|damaged"),
    "goes on": (
        packed([*texts(digests={"state": "@"}), ("000-state", b"x")], end=bytes(2 << 20)),
        "behind its end",
    ),
    "overlap": (packed(parts([0, 2], [1, 2], size=9)), "overlap"),
    "behind the end": (packed(parts([0, 2])), "behind its end"),
    "negative": (packed(parts([-1, 1])), "wrong parts"),
    "no number": (packed(parts([0, True])), "wrong parts"),
    "huge": (packed(parts(size=1 << 60)), "no size"),
    "other files": (packed(texts(rows=[])), "different files"),
}  # fmt: skip
NAMES = [
    "../x",
    "/etc/x",
    "a//b",
    "a/../b",
    "",
    ".x",
    "a/.ssh",
    "é",
    "a\nb",
    "in-use.lock",
    "thing.json",
    "a/b/c/d/e",
]


def with_right_digest(data, tmp_path):
    """A case's file, with the digest of an `x` for `@`."""
    (tmp_path / "x").write_bytes(b"x")
    digest = integrity.file_digest(tmp_path / "x").encode()
    plain = bytearray(gzip.decompress(data))
    at = plain.index(b'"@"')
    old = json.dumps({"schema": 7, "digests": {"state": "@"}}).encode()
    header = tarfile.TarInfo("record.json")
    header.size = len(old) + 63
    record = old.replace(b"@", digest)
    assert at < 2048
    return gzip.compress(
        header.tobuf(tarfile.GNU_FORMAT) + record + bytes(-len(record) % 512) + plain[1024:]
    )


class TestStrangers:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_is_refused(self, case, tmp_path):
        data, why = REFUSED[case]
        if case in ("further file", "goes on"):
            data = with_right_digest(data, tmp_path)
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ConfigError, match=why):
            unpack(tmp_path / "file", tmp_path / "new")

    @pytest.mark.parametrize("name", NAMES)
    def test_names(self, name, tmp_path):
        (tmp_path / "file").write_bytes(packed(texts(digests={name: DIGEST})))
        with pytest.raises(ConfigError, match="no plain name"):
            unpack(tmp_path / "file", tmp_path / "new")

    def test_a_file_that_is_also_a_folder(self, tmp_path):
        (tmp_path / "file").write_bytes(packed(texts(digests={"a": DIGEST, "a/b": DIGEST})))
        with pytest.raises(ConfigError, match="as a file and as a folder"):
            unpack(tmp_path / "file", tmp_path / "new")

    def test_more_than_the_disk_has(self, tmp_path):
        rows = [{"path": "state", "size": 1 << 40, "parts": [[0, 1 << 40]]}]
        (tmp_path / "file").write_bytes(packed(texts(rows=rows)))
        with pytest.raises(CacheError, match="needs 1TiB"):
            unpack(tmp_path / "file", tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []

    def test_damage_is_noticed(self, file, entry, tmp_path):
        data = bytearray(file.read_bytes())
        noticed = 0
        for at in range(20, len(data), len(data) // 12):
            data[at] ^= 0x55
            file.write_bytes(data)
            try:
                export = unpack(file, tmp_path / f"new{at}")
            except ConfigError:
                noticed += 1
            else:  # a changed reference from zeros to other zeros makes no difference
                assert export.record == entry.record
            data[at] ^= 0x55
        assert noticed > 9

    def test_what_is_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match="a folder"):
            unpack(tmp_path, tmp_path / "new")
        with pytest.raises(ConfigError, match="does not exist"):
            unpack(tmp_path / "gone", tmp_path / "other")
