"""Where our files lie, on machines of all kinds."""

from pathlib import Path

import platformdirs
import pytest

from pytest_vmsandbox.core import paths
from pytest_vmsandbox.core.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name in ("VMSANDBOX_CACHE", "VMSANDBOX_RUNTIME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_a_variable_names_them(tmp_path, monkeypatch):
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(tmp_path / "r"))
    assert (paths.cache_dir(), paths.runtime_dir()) == (tmp_path / "c", tmp_path / "r")


def test_the_session_has_a_runtime_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert paths.runtime_dir() == tmp_path / "vmsandbox"


@pytest.mark.parametrize("kind", ["missing", "a file", "another user's"])
def test_one_that_is_of_no_use_is_passed_over(tmp_path, monkeypatch, kind):
    folder = tmp_path / "run"
    if kind == "a file":
        folder.touch()
    if kind == "another user's":
        folder.mkdir()
        monkeypatch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert paths.runtime_dir().parent == tmp_path / "tmp"


def homeless(*_, **__):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("told", [homeless, lambda *_, **__: Path("~/.cache/vmsandbox")])
def test_no_home(monkeypatch, told):
    monkeypatch.setattr(platformdirs, "user_cache_path", told)
    with pytest.raises(ConfigError, match="no home") as caught:
        paths.cache_dir()
    assert "VMSANDBOX_CACHE" in caught.value.remedy
