"""The project under test, in the ways in which it can be installed here."""

import base64
import csv
import hashlib
import json
import sys

import pytest

from pytest_vmsandbox.core.errors import TransferError
from pytest_vmsandbox.inside.project import Project


class Installed:
    """A tree, and an environment that it is installed in."""

    def __init__(self, folder):
        self.root = folder / "tree"
        self.site = folder / "venv" / "lib" / "python3.13" / "site-packages"
        self.root.mkdir()
        self.site.mkdir(parents=True)
        self.path = [str(self.site)]

    def write(self, *names, content=""):
        for name in names:
            file = self.root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)

    def install(self, name="My.App", *, origin=None, record=(), **files):
        info = self.site / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "RECORD").write_text("".join(f"{it},,\n" for it in record))
        for it in record:  # since Python 3.12, what is not there is not told
            if ".dist-info" not in it:
                (self.site / it).parent.mkdir(parents=True, exist_ok=True)
                (self.site / it).touch()
        if origin is not None:
            (info / "direct_url.json").write_text(json.dumps(origin))
        for file, text in files.items():
            (info / file.replace("__", ".")).write_text(text)

    def editable(self, below=""):
        return {"url": (self.root / below).as_uri(), "dir_info": {"editable": True}}

    def project(self):
        return Project.of(self.root, self.path)


@pytest.fixture
def here(tmp_path):
    return Installed(tmp_path)


def test_not_installed(here):
    here.write("mod.py")
    found = here.project()
    assert (found.root, found.names, found.import_roots) == (here.root, (), ())
    assert (found.metadata, found.scripts) == ({}, {})


def test_import_roots_are_what_python_has_in_its_order(here, monkeypatch):
    here.write("tests/unit/x.py", "src/a.py", "env/pyvenv.cfg", "env/lib/x.py", "conda/lib/x.py")
    (here.root / "v" / "site-packages").mkdir(parents=True)
    monkeypatch.setattr(sys, "base_prefix", str(here.root / "conda"))
    monkeypatch.chdir(here.root)
    inside = ["tests", "v/site-packages", "env/lib", "conda/lib", "nope", "src", "tests"]
    outside = [str(here.root.parent), str(here.site), str(here.root) + "-other"]
    here.path = [*outside, *(str(here.root / it) for it in inside), "", "tests/unit"]
    assert here.project().import_roots == ("tests", "src", "", "tests/unit")


def test_a_root_behind_a_link(here, tmp_path):
    here.write("src/a.py")
    (tmp_path / "link").symlink_to(here.root)
    found = Project.of(tmp_path / "link", [str(here.root / "src")])
    assert found.import_roots == ("src",)


def test_an_editable_one_by_path(here):
    here.write("src/my_app/__init__.py")
    here.install(origin=here.editable(), record=["_editable_impl_my_app.pth"])
    here.path.append(str(here.root / "src"))
    found = here.project()
    assert (found.names, found.import_roots) == (("my-app",), ("src",))


def test_an_editable_one_by_finder(here):
    here.write("src/my_app/__init__.py")
    here.install(origin=here.editable(), record=["__editable___my_app_1_2_finder.py"])
    assert here.project().import_roots == ("src",)


def test_a_finder_that_knows_better(here, monkeypatch):
    here.write("code/odd_place/__init__.py")
    here.install(origin=here.editable(), top_level__txt="odd_place\n")
    monkeypatch.syspath_prepend(here.root / "code")
    assert here.project().import_roots == ("code",)


def test_an_editable_one_whose_modules_are_nowhere(here):
    here.install(origin=here.editable(), top_level__txt="built_at_import\n")
    assert here.project().import_roots == ()


def test_modules_are_named_so_that_what_git_ignores_of_them_goes_too(here, tmp_path):
    here.write("src/my_app/__init__.py", "src/one.py", "fast.abi3.so", "src/other/x.py")
    here.install(origin=here.editable(), top_level__txt="my_app\none\nfast\nlinked\n")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "x.py").touch()
    (here.root / "lib").symlink_to(tmp_path)  # what is behind a link does not go
    found = here.project()
    assert found.modules == ("fast.abi3.so", "src/my_app", "src/one.py")


@pytest.mark.parametrize(
    ("tree", "roots"),
    [
        (["src/my_app/__init__.py", "my_app/data.txt"], ("src",)),
        (["my_app/__init__.py"], ("",)),
        (["lib/my_app.py"], ("lib",)),
        (["src/my_app/sub/mod.py"], ("src",)),
        (["my_app.cpython-313-x86_64-linux-gnu.so"], ("",)),
    ],
)
@pytest.mark.parametrize("declared", ["pyproject.toml", "poetry", "setup.cfg"])
def test_a_wheel_by_tox(here, tree, roots, declared):
    here.write(*tree)
    table = {"pyproject.toml": "project", "poetry": "tool.poetry", "setup.cfg": "metadata"}
    name = "my_app" if declared == "setup.cfg" else '"my_app"'
    file = "setup.cfg" if declared == "setup.cfg" else "pyproject.toml"
    here.write(file, content=f"[{table[declared]}]\nname = {name}\n")
    wheel = {"url": (here.root / ".tox/my_app.whl").as_uri(), "archive_info": {}}
    record = ["my_app/__init__.py", "my_app-1.2.dist-info/METADATA", "../../../bin/my.py", "L.txt"]
    here.install(origin=wheel, record=record)
    found = here.project()
    assert (found.names, found.import_roots) == (("my-app",), roots)


def test_another_wheel_in_the_tree_is_not_the_project(here):
    wheel = {"url": (here.root / "vendor/my_app.whl").as_uri(), "archive_info": {}}
    here.install(origin=wheel)
    assert here.project().names == ()


def test_what_is_only_compiled_is_named(here):
    here.write("pyproject.toml", content='[project]\nname = "my-app"\n')
    here.write("src/lib.rs")
    here.install(record=["_my_app.cpython-313-x86_64-linux-gnu.so"])
    with pytest.raises(TransferError, match="'_my_app' of my-app") as caught:
        here.project()
    assert caught.value.stage == "transfer"


def test_a_workspace(here):
    here.write("packages/a b/src/a.py", "packages/b/b/__init__.py")
    for name, below in (("a", "packages/a b"), ("b", "packages/b")):
        here.install(name, origin=here.editable(below), record=[f"__editable__.{name}.pth"])
    here.path += [str(here.root / "packages/a b/src"), str(here.root / "packages/b")]
    found = here.project()
    assert (found.names, found.import_roots) == (("a", "b"), ("packages/a b/src", "packages/b"))


def test_a_developed_one_has_its_metadata_in_the_tree(here):
    here.write("src/My_App.egg-info/PKG-INFO", content="Name: My_App\nVersion: 3\n")
    here.write("src/My_App.egg-info/entry_points.txt", content="[pytest11]\nx = my_app\n")
    here.write("src/my_app.py")
    here.path = [str(here.root / "src")]
    found = here.project()
    assert (found.names, found.import_roots) == (("my-app",), ("src",))
    folder = "my_app-3.dist-info"
    assert found.metadata[f"{folder}/METADATA"] == b"Name: My_App\nVersion: 3\n"
    assert found.metadata[f"{folder}/WHEEL"].startswith(b"Wheel-Version: 1.0\n")
    assert b"pytest11" in found.metadata[f"{folder}/entry_points.txt"]


def test_metadata_without_code(here):
    here.write("my_app/__init__.py")
    entry_points = "[console_scripts]\nmy-app = my_app:main\n"
    here.install(
        origin=here.editable(),
        record=["my_app/__init__.py"],
        WHEEL="Wheel-Version: 1.0\n",
        entry_points__txt=entry_points,
        top_level__txt="my_app\n",
    )
    found = here.project()
    folder = "my_app-1.2.dist-info"
    names = {"METADATA", "WHEEL", "INSTALLER", "RECORD", "entry_points.txt", "top_level.txt"}
    assert found.metadata.keys() == {f"{folder}/{it}" for it in names}
    rows = list(csv.reader(found.metadata[f"{folder}/RECORD"].decode().splitlines()))
    assert {row[0] for row in rows} == found.metadata.keys()
    for path, checksum, size in rows[:-1]:
        digest = hashlib.sha256(found.metadata[path]).digest()
        assert checksum == "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        assert int(size) == len(found.metadata[path])
    assert rows[-1] == [f"{folder}/RECORD", "", ""]
    assert found.scripts.keys() == {"my-app"}
    assert found.scripts["my-app"].startswith(b"#!/opt/vmsandbox/env/bin/python\n")


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.cfg"])
def test_a_declaration_that_cannot_be_read(here, name):
    here.write(name, content="[[[\n= x")
    assert here.project().names == ()
