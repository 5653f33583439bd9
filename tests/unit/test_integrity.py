"""Records and digests of files in the cache; `test_memory` has those of files with holes."""

from pathlib import Path

import pytest

from pytest_vmsandbox.cache import integrity
from support import damage


class TestRecord:
    def test_is_read_as_it_was_kept(self, tmp_path):
        file = tmp_path / "record"
        kept = integrity.write_record(file, {"a": (1, "ä"), "b": Path("/x"), "c": None})
        assert kept == integrity.read_record(file) == {"a": [1, "ä"], "b": "/x", "c": None}

    @pytest.mark.parametrize("harm", sorted(damage.KINDS.keys() - {"removed"}))
    def test_one_that_has_changed(self, tmp_path, harm):
        file = tmp_path / "record"
        integrity.write_record(file, {"a": "b" * 100})
        damage.KINDS[harm](file)
        with pytest.raises(ValueError, match="record has changed"):
            integrity.read_record(file)

    @pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"7", b'{"seal": 1}', b"\xff"])
    def test_what_is_none(self, tmp_path, content):
        (tmp_path / "record").write_bytes(content)
        with pytest.raises(ValueError, match="record has changed"):
            integrity.read_record(tmp_path / "record")

    def test_none(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            integrity.read_record(tmp_path / "record")


class TestDamage:
    @pytest.mark.parametrize("harm", damage.KINDS)
    def test_names_the_file(self, tmp_path, harm):
        for name in "ab":
            (tmp_path / name).write_text(name * 100)
        digests = {name: integrity.file_digest(tmp_path / name) for name in "ab"}
        assert integrity.damage(tmp_path, digests) == ""
        damage.KINDS[harm](tmp_path / "b")
        assert integrity.damage(tmp_path, digests).startswith("b")
