"""What goes into a guest's environment, with distributions and a uv that are fakes."""

import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from importlib.metadata import Distribution, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.store import ENVIRONMENTS, Entry, Store
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import CacheError, ConfigError, TransferError
from pytest_vmsandbox.inside import distributions, environment as environment_module
from pytest_vmsandbox.inside.distributions import console_scripts, installed
from pytest_vmsandbox.inside.environment import GuestPython, parse_probe, prepare
from pytest_vmsandbox.inside.requirements import Requirements
from support import damage

PYTHON = GuestPython(version=(3, 13, 5), machine="x86_64", libc=(2, 41))
# It "installs" what the file `wheel` in its folder holds, and notes how it was called.
UV = """\
#!/bin/sh
here=$(dirname "$0")
echo "$@" >> "$here/calls"
for it; do
    case $last in
        --output-file) output=$it ;;
        --target) target=$it ;;
        --find-links) links=$it ;;
        --no-binary) build=$it ;;
        --overrides) cp "$it" "$here/overrides" ;;
    esac
    case $it in */asked.in) cp "$it" "$here/asked" ;; esac
    last=$it
done
if [ -n "$build" ]; then
    [ -e "$here/sources" ] || exit 1
    cp -r "$here/sources" "$target"
    exit 0
fi
ls "$links"/*.whl >> "$here/links" 2>/dev/null
[ -e "$here/refuse" ] && ! [ -s "$here/links" ] && ! [ -s "$here/overrides" ] && { cat "$here/refuse" >&2; exit 1; }
[ -n "$output" ] && cp "$output" "$here/preferred"
if [ -n "$target" ]; then
    cp -r "$here/wheel" "$target"
    touch "$target/.lock"
fi
exit 0
"""


class Host:
    """A folder of site-packages."""

    def __init__(self, folder):
        self.folder = folder
        self.path = [str(folder)]
        folder.mkdir()

    def add(self, name, *requires, version="1.0", **files):
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = [
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {it}" for it in requires),
        ]
        (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
        for file, text in files.items():
            (info / file.replace("__", ".")).write_text(text)
        return info

    def mirror(self, *projects, root=Path("/p"), say=pytest.fail):
        with installed_here(*self.path):
            return Requirements.of_host(root, projects, say=say)


@contextmanager
def installed_here(*folders):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributions, "installed", lambda: installed(folders))
        yield


class FakeUv:
    def __init__(self, folder):
        self.folder = folder
        self.program = folder / "uv"
        (folder / "wheel").mkdir(parents=True)
        self.program.write_text(UV)
        self.program.chmod(0o755)

    def calls(self):
        try:
            return (self.folder / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []

    def refuse(self, text):
        (self.folder / "refuse").write_text(text)

    def read(self, name):
        return (self.folder / name).read_text().splitlines()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path / "site-packages")
    host.add("pytest", "pluggy>=1.5", "tomli; python_version < '3.0'", version="9.2.0")
    host.add("pluggy", version="1.6.0")
    return host


@pytest.fixture
def uv(tmp_path, monkeypatch):
    uv = FakeUv(tmp_path / "fake")
    monkeypatch.setattr(environment_module, "_find_uv", lambda: str(uv.program))
    return uv


class Maker:
    """Prepares an environment, and collects what is said."""

    def __init__(self, folder):
        self.folder = folder
        self.said = []
        self.told = []

    def __call__(self, requirements=None, python=PYTHON, *, offline=False):
        requirements = requirements or Requirements(root=self.folder, lines=("pytest>=8.4",))
        with prepare(
            requirements,
            python,
            offline=offline,
            say=self.said.append,
            tell=self.told.append,
        ) as prepared:
            return prepared


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path):
    return Maker(tmp_path)


def left_in(cache):
    return sorted(it.name for it in (cache / "environments").iterdir() if it.suffix != ".lock")


# The mirror


def test_the_mirror_asks_for_roots_and_prefers_all(host):
    host.add("hypothesis", "sortedcontainers")
    host.add("sortedcontainers", version="2.4")
    found = host.mirror()
    assert found.lines == ("pytest>=8.4,<=9.2.0", "hypothesis", "pytest")
    assert found.preferred == (
        "hypothesis==1.0",
        "pluggy==1.6.0",
        "pytest==9.2.0",
        "sortedcontainers==2.4",
    )


def test_what_only_the_left_out_need_goes_with_them(host):
    host.add("tox", "execnet", "pytest")
    host.add("execnet")
    host.add("pytest-vmsandbox", "paramiko", "Rich")
    host.add("paramiko", "shared")
    host.add("rich")
    host.add("requests", "shared")
    host.add("shared")
    found = host.mirror()
    assert found.lines == ("pytest>=8.4,<=9.2.0", "requests")
    assert found.preferred == ("pluggy==1.6.0", "pytest==9.2.0", "requests==1.0", "shared==1.0")


def test_plugins_that_are_of_this_side_alone_can_be_imported_there(host):
    host.add("pytest-xdist", "execnet", "pytest")
    host.add("execnet")
    assert "pytest-xdist" in host.mirror().lines
    assert "execnet==1.0" in host.mirror().preferred


def test_a_left_out_one_stays_when_it_is_needed(host):
    host.add("pytest-mypy-plugins", "mypy")
    host.add("mypy")
    assert "mypy==1.0" in host.mirror().preferred


def test_what_extras_need_is_needed(host):
    host.add("tox", "coverage[toml]")
    host.add("coverage", "tomli; extra == 'toml'", "other; extra == 'x'")
    host.add("tomli")
    host.add("other")
    assert host.mirror().lines == ("pytest>=8.4,<=9.2.0", "other", "pytest")


def test_one_more(tmp_path):
    """In the version that is here; the project itself never."""
    given = Requirements(root=tmp_path, lines=("pytest",), dropped=("hypothesis",))
    assert given.with_one("hypothesis") == given
    more = given.with_one("coverage")
    assert more.lines == ("pytest", "coverage")
    assert more.preferred == (f"coverage=={version('coverage')}",)
    assert given.with_one("nothing-like-that").preferred == ()


def test_a_ring_has_a_root(host):
    host.add("sphinx", "theme")
    host.add("theme", "sphinx")
    assert host.mirror().lines[1:] == ("pytest", "sphinx")


def test_the_first_of_a_name_counts(host, tmp_path):
    second = Host(tmp_path / "later")
    second.add("Pluggy", version="0.1")
    assert installed([*host.path, *second.path])["pluggy"].version == "1.6.0"


def test_the_project_comes_as_a_tree_but_what_it_needs_is_installed(host):
    host.add(
        "my-app",
        "requests>=2",
        "backport>=1; python_version < '3.9'",
        "docs-tool; extra == 'docs'",
        direct_url__json=json.dumps({"url": "file:///p", "dir_info": {"editable": True}}),
    )
    host.add("requests", version="2.1")
    found = host.mirror("my-app")
    assert found.lines[1:] == ('backport>=1; python_version < "3.9"', "pytest", "requests>=2")
    assert found.preferred == ("pluggy==1.6.0", "pytest==9.2.0", "requests==2.1")
    assert found.dropped == ("my-app", "pytest-vmsandbox")


@pytest.mark.parametrize(
    "origin",
    [
        {"url": "file:///elsewhere", "dir_info": {"editable": True}},
        {"url": "file:///tmp/it.whl", "archive_info": {}},
        {"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "0"}},
    ],
)
def test_what_no_index_has_is_left_out_and_told(host, origin):
    host.add("b-lib", "needed>=3", direct_url__json=json.dumps(origin))
    host.add("needed", version="3.1")
    said = []
    found = host.mirror(say=said.append)
    assert (len(said), "b-lib" in said[0]) == (1, True)
    assert "b-lib" in found.dropped
    assert "needed>=3" in found.lines


def test_a_developed_one_is_local(host, tmp_path):
    egg = tmp_path / "tree" / "old.egg-info"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: old\nVersion: 1\n")
    host.path.append(str(egg.parent))
    said = []
    host.mirror(say=said.append)
    assert "old" in said[0]


def test_what_cannot_be_parsed_is_passed_over(host):
    host.add("odd", "this is: no requirement", direct_url__json="[")
    assert "odd" in host.mirror().lines


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("9.3.0.dev1+gabc", "<=9.3.0.dev1"), ("8.4", "<=8.4"), ("unknown", ">=8.4")],
)
def test_pytest_is_not_newer_than_here(tmp_path, version, wanted):
    host = Host(tmp_path / "site-packages")
    host.add("pytest", version=version)
    assert host.mirror().lines[0].endswith(wanted)


@pytest.mark.parametrize("needed", [False, True])
def test_setuptools_that_a_new_environment_has_by_itself(host, monkeypatch, needed):
    monkeypatch.setattr(sys, "version_info", (3, 11, 7))
    host.add("setuptools")
    if needed:
        host.add("old-style", "setuptools")
    assert ("setuptools==1.0" in host.mirror().preferred) is needed


# What the setting names


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "p"\n[project.optional-dependencies]\nfast = ["lxml"]\n'
        '[dependency-groups]\ntest = ["hypothesis"]\n[tool.ruff]\nline-length = 1\n'
    )
    (root / "tests.txt").write_text("-r more.txt\nsix\n")
    (root / "more.txt").write_text("-c tests.txt\nattrs\n")
    return root


def named(root, *entries, projects=()):
    with installed_here():
        return Requirements.of_entries(root, entries, projects)


def test_entries(root):
    entries = ("tests.txt", "group:test", "extra:Fast", "requests>=2")
    found = named(root, *entries, projects=["p"])
    assert found.lines == ("pytest>=8.4", "requests>=2")
    assert found.files == ("tests.txt", "pyproject.toml")
    options = "--no-emit-package p --group pyproject.toml:test --extra Fast"
    assert " ".join(found.options) == options
    assert found.contents[:2] == ("-r more.txt\nsix\n", "-c tests.txt\nattrs\n")
    assert "hypothesis" in found.contents[2]


def test_a_group_does_not_bring_what_the_project_needs(root):
    assert named(root, "group:test").files == ()
    assert named(root, ".").files == ("pyproject.toml",)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("group:nope", "does not have 'nope'. It has: test"),
        ("extra:nope", "does not have 'nope'. It has: fast"),
        ("nope.txt", "this file does not exist"),
        ("what is this", "what is this"),
        ("", "Expected"),
    ],
)
def test_an_entry_that_cannot_be_meant(root, entry, why):
    with pytest.raises(ConfigError, match="vm_requirements") as caught:
        named(root, entry)
    assert repr(entry) in caught.value.brief
    assert why in caught.value.details
    assert "group:NAME" in caught.value.remedy


@pytest.mark.parametrize("content", [None, "[", '[tool.x]\na = "b"\n'])
def test_no_project_table(root, content):
    (root / "pyproject.toml").unlink()
    if content:
        (root / "pyproject.toml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        named(root, ".")
    assert "pyproject.toml" in caught.value.details


def test_what_only_a_build_would_tell(root):
    (root / "pyproject.toml").write_text('[project]\nname = "p"\ndynamic = ["dependencies"]\n')
    with pytest.raises(ConfigError) as caught:
        named(root, ".")
    assert "dynamic" in caught.value.details


def test_a_nested_file_is_missing(root):
    (root / "more.txt").unlink()
    with pytest.raises(ConfigError, match="tests.txt"):
        named(root, "tests.txt")


def test_the_digest_is_of_all_that_matters(root):
    def digest(python=PYTHON):
        return named(root, "tests.txt", "group:test").digest(python)

    first = digest()
    assert digest() == first
    pyproject = root / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 1", "line-length = 2"))
    assert digest() == first
    pyproject.write_text(pyproject.read_text().replace("hypothesis", "attrs"))
    second = digest()
    (root / "more.txt").write_text("attrs<20\n")
    third = digest()
    older = GuestPython(version=(3, 9, 2), machine="x86_64", libc=(2, 31))
    assert len({first, second, third, digest(older)}) == 4


# The guest's Python


def argument(arguments, name):
    return dict(pairwise(arguments)).get(name)


@pytest.mark.parametrize(
    ("machine", "libc", "platform"),
    [
        ("x86_64", (2, 41), "x86_64-manylinux_2_40"),
        ("x86_64", (3, 0), "x86_64-manylinux_2_40"),
        ("aarch64", (2, 36), "aarch64-manylinux_2_36"),
        ("x86_64", (2, 30), "x86_64-manylinux_2_28"),
        ("x86_64", (2, 17), "x86_64-manylinux_2_17"),
    ],
)
def test_platforms(tmp_path, machine, libc, platform):
    python = GuestPython(version=(3, 9, 0), machine=machine, libc=libc)
    arguments = python.for_uv(tmp_path / "python")
    assert argument(arguments, "--python-version") == "3.9.0"
    assert argument(arguments, "--python-platform") == platform
    assert argument(arguments, "--python") == sys.executable


SAYS = """
import os, platform, sys, sysconfig
print(platform.machine(), sysconfig.get_platform(), os.confstr("CS_GNU_LIBC_VERSION"), sys.prefix)
"""


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES.keys() - {"x86_64", "aarch64"}))
def test_an_interpreter_stands_in_for_a_platform_that_uv_does_not_name(tmp_path, machine):
    """That is how the stand-in answers the questions that uv asks of an interpreter."""
    python = GuestPython(version=(3, 14, 0), machine=machine, libc=(2, 42))
    arguments = python.for_uv(tmp_path / "python")
    assert argument(arguments, "--python-version") == "3.14.0"
    assert "--python-platform" not in arguments
    program = argument(arguments, "--python")
    assert arguments == python.for_uv(tmp_path / "python")
    done = subprocess.run(
        [program, "-I", "-B", "-c", SAYS], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        *(machine, f"linux-{machine}", "glibc", "2.42", str(tmp_path / "python")),
    ]


@pytest.mark.parametrize(
    ("machine", "bits", "architecture"),
    [
        ("x86_64", 64, "x86_64"),
        ("x86_64", 32, "i686"),
        ("i586", 32, "i686"),
        ("aarch64", 32, "armv7l"),
        ("armv8l", 32, "armv7l"),
        ("armv7l", 32, "armv7l"),
        ("ppc64le", 64, "ppc64le"),
        ("s390x", 64, "s390x"),
        ("mips64", 64, "mips64"),
    ],
)
def test_the_programs_of_a_guest_count_not_its_processor(machine, bits, architecture):
    """A Debian for i386 can run on a kernel for amd64."""
    facts = {"version": [3, 13, 5], "libc": ["glibc", "2.41"], "executable": "/usr/bin/python3"}
    python, executable = parse_probe(json.dumps({**facts, "machine": machine, "bits": bits}))
    assert (python.machine, python.libc, executable) == (architecture, (2, 41), "/usr/bin/python3")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"version": (3, 8, 20)}, "3.8.20 in the guest is too old"),
        ({"machine": "mips64"}, "mips64 with glibc 2.41"),
        ({"machine": "riscv64", "libc": ()}, "riscv64 with no glibc"),
        ({"libc": (2, 12)}, "glibc 2.12"),
    ],
)
def test_a_guest_without_wheels(make, uv, fields, why):
    python = GuestPython(**{"version": (3, 13, 5), "machine": "x86_64", "libc": (2, 41), **fields})
    with pytest.raises(TransferError, match=why):
        make(python=python)
    assert uv.calls() == []


def test_a_foreign_guest_without_a_wheel_is_told_which(make, uv, host, tmp_path):
    uv.refuse("× No solution\nBecause numpy==2.3.0 has no usable wheels")
    python = GuestPython(version=(3, 13, 5), machine="s390x", libc=(2, 41))
    with installed_here(*host.path), pytest.raises(TransferError) as raised:
        make(python=python)
    assert raised.value.brief == "no wheel for the guest (Python 3.13, s390x) of: numpy"
    assert "without numpy" in raised.value.remedy
    assert f"--python {tmp_path}" in uv.calls()[0]


# Making and keeping


def test_an_environment_is_made_once(make, uv, tmp_path, host):
    requirements = host.mirror("me", root=tmp_path, say=print)
    made = make(requirements)
    compiled, install = uv.calls()
    for call in (compiled, install):
        for expected in (
            "--python-version 3.13.5 --python-platform x86_64-manylinux_2_40",
            "--only-binary :all:",
        ):
            assert expected in call
    assert uv.read("asked") == ["pytest>=8.4,<=9.2.0", "pytest"]
    assert uv.read("preferred") == ["pluggy==1.6.0", "pytest==9.2.0"]
    assert uv.read("overrides")[0] == "me ; python_version < '3'"
    assert (made.folder / "requirements.txt").read_text().splitlines() == uv.read("preferred")
    assert list((made.folder / "site-packages").iterdir()) == []
    assert make.said == ["preparing packages for Python 3.13.5 in guests"]
    assert make(requirements) == made
    assert len(uv.calls()) == 2
    assert left_in(tmp_path / "cache") == [made.folder.name]


def test_index_settings_reach_uv_and_what_contradicts_does_not(make, uv, monkeypatch):
    uv.program.write_text(UV.replace('echo "$@"', "env"))
    monkeypatch.setenv("UV_INDEX_URL", "https://mirror.invalid/simple")
    monkeypatch.setenv("UV_COMPILE_BYTECODE", "1")
    make()
    assert "UV_INDEX_URL=https://mirror.invalid/simple" in uv.calls()
    assert not any(it.startswith("UV_COMPILE_BYTECODE") for it in uv.calls())


def test_folders_of_wheels_reach_uv_beside_ours(make, uv, monkeypatch):
    """Those on its command line alone would replace those that the variable names."""
    monkeypatch.setenv("UV_FIND_LINKS", "/mine,https://mirror.invalid/wheels")
    make()
    for call in uv.calls():
        words = call.split()
        links = [value for name, value in pairwise(words) if name == "--find-links"]
        assert links[:-1] == ["/mine", "https://mirror.invalid/wheels"]
        assert links[-1].endswith("/wheels")
    assert len(uv.calls()) == 2


def test_programs_are_the_guests(make, uv):
    wheel = uv.folder / "wheel"
    (wheel / "bin").mkdir()
    for name, content in {
        "tool": b"#!/host/bin/python\nhost()\n",
        "script": b"#!/host/bin/python3.11\ndata()\n",
        "long": b"#!/bin/sh\n'''exec' '/a b/python' \"$0\" \"$@\"\n' '''\ndata()\n",
        "shell": b"#!/bin/sh\necho\n",
        "elf": b"\x7fELFpython",
    }.items():
        (wheel / "bin" / name).write_bytes(content)
    info = wheel / "tool-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: tool\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[console_scripts]\ntool = tool.cli:App.main [extra]\n../evil = a:b\nmodule = tool\n"
    )
    made = make()
    head = "#!/opt/vmsandbox/env/bin/python\n"
    texts = {it.name: it.read_bytes() for it in (made.folder / "bin").iterdir()}
    assert texts.keys() == {"tool", "script", "long", "shell", "elf"}
    assert texts["tool"].decode() == (
        f"{head}import sys\nfrom tool.cli import App\n"
        'if __name__ == "__main__":\n    sys.exit(App.main())\n'
    )
    assert texts["script"] == texts["long"] == f"{head}data()\n".encode()
    assert (texts["shell"], texts["elf"]) == (b"#!/bin/sh\necho\n", b"\x7fELFpython")
    assert {it.stat().st_mode & 0o777 for it in (made.folder / "bin").iterdir()} == {0o755}
    assert sorted(it.name for it in (made.folder / "site-packages").iterdir()) == [
        "tool-1.dist-info"
    ]


def test_a_generated_program_runs(tmp_path):
    (tmp_path / "mod.py").write_text("def main():\n    return 7\n")

    class Fake(Distribution):
        def read_text(self, name):
            return "[console_scripts]\nit = mod:main\n" if name == "entry_points.txt" else None

        def locate_file(self, path):
            return Path(path)

    (tmp_path / "it").write_bytes(console_scripts(Fake())["it"])
    done = subprocess.run([sys.executable, "-S", tmp_path / "it"], check=False)
    assert done.returncode == 7


@pytest.fixture
def room_for_two(make, uv, monkeypatch):
    """Further environments are made where two fit into the cache, no more."""
    one = make(Requirements(root=make.folder, lines=("pytest", "one")))
    limit = {"keep": None, "limit": 2 * one.size_on_disk}
    monkeypatch.setattr(Store.shrink, "__kwdefaults__", limit)
    shutil.rmtree(one.folder)


def test_what_others_left_is_removed(make, room_for_two, tmp_path):
    old = make()
    fresh = make(Requirements(root=tmp_path, lines=("pytest", "six")))
    os.utime(old.folder / "in-use.lock", (0, 0))
    (old.folder.parent / ".new-killed" / "out").mkdir(parents=True)
    new = make(Requirements(root=tmp_path, lines=("pytest", "attrs")))
    Store(tmp_path / "cache", ENVIRONMENTS, Entry).sweep()
    assert left_in(tmp_path / "cache") == sorted([fresh.folder.name, new.folder.name])


def test_use_keeps_an_environment(make, room_for_two, tmp_path):
    old = make()
    os.utime(old.folder / "in-use.lock", (0, 0))
    other = make(Requirements(root=tmp_path, lines=("pytest", "six")))
    os.utime(other.folder / "in-use.lock", (1, 1))
    make()
    make(Requirements(root=tmp_path, lines=("pytest", "attrs")))
    assert old.folder.exists()
    assert not other.folder.exists()


def test_another_run_makes_room_meanwhile(make, uv, tmp_path, monkeypatch):
    """It is held while it is looked at, and then it stays."""
    store, made = Store(tmp_path / "cache", ENVIRONMENTS, Entry), make()
    damage_of, freed = Entry.damage, []

    def look(environment):
        freed.append(store.discard([environment.folder]).removed)
        return damage_of(environment)

    monkeypatch.setattr(Entry, "damage", look)
    assert make() == made
    assert freed == [0]
    assert len(make.said) == 1


def test_a_cache_that_can_only_be_read(make, uv, monkeypatch):
    def refuse(*_):
        raise PermissionError

    made = make()
    monkeypatch.setattr("os.utime", refuse)
    assert make() == made


@pytest.mark.parametrize("harm", damage.KINDS)
@pytest.mark.parametrize(
    "name",
    [
        *("requirements.txt", "environment.json", "bin/tool"),
        *("site-packages/tool.py", "site-packages/tool-1.dist-info/entry_points.txt"),
    ],
)
def test_damage_is_found_told_once_and_mended(make, uv, name, harm):
    info = uv.folder / "wheel" / "tool-1.dist-info"
    info.mkdir()
    (info.parent / "tool.py").write_text("def main():\n    return 0\n")
    (info / "METADATA").write_text("Name: tool\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[console_scripts]\ntool = tool:main\n")
    made = make(Requirements(root=uv.folder, lines=("pytest", "tool"), preferred=("tool==1",)))
    content = damage.files(made.folder)
    damage.KINDS[harm](made.folder / name)
    for _ in range(2):
        again = make(Requirements(root=uv.folder, lines=("pytest", "tool"), preferred=("tool==1",)))
        assert damage.files(again.folder) == content
    (line,) = make.told
    assert "damaged" in line
    assert Path(name).name in line
    assert len(uv.calls()) == 4


def test_another_process_makes_it(make, uv, tmp_path):
    """We wait for its lock, and take what it has made."""
    parent = tmp_path / "cache" / "environments"
    parent.mkdir(parents=True, mode=0o700)
    digest = Requirements(root=tmp_path, lines=("pytest>=8.4",)).digest(PYTHON)
    with (parent / f"{digest}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = []
        thread = threading.Thread(target=lambda: made.append(make()))
        thread.start()
        while not make.said:
            thread.join(0.001)
        (parent / digest).mkdir()
        (parent / digest / "in-use.lock").touch()
        integrity.write_record(parent / digest / "environment.json", {"schema": 1, "digests": {}})
    thread.join()
    assert made[0].folder.name == digest
    assert uv.calls() == []
    assert "another run is preparing packages" in make.said[0]


def test_uv_holds_the_lock(make, uv, tmp_path):
    """When pytest is killed, nobody meddles with what uv is still writing."""
    digest = Requirements(root=tmp_path, lines=("pytest>=8.4",)).digest(PYTHON)
    lock = tmp_path / "cache" / "environments" / f"{digest}.lock"
    uv.program.write_text(f'#!/bin/sh\nreadlink /proc/self/fd/* > "{tmp_path}/open"\nexit 1\n')
    with pytest.raises(TransferError):
        make()
    assert str(lock) in (tmp_path / "open").read_text()


# Errors


def failing(make, uv, text, **options):
    uv.refuse(text)
    with pytest.raises(TransferError) as caught:
        make(**options)
    return caught.value


NO_WHEEL = {
    "docopt": (
        "  cause: Because all versions of docopt have no usable wheels and you require docopt, we\n"
        "hint: Wheels are required for `docopt` because building from source is disabled\n"
    ),
    "pywin32": (
        "  cause: Because pywin32<=306 has no wheels with a matching Python ABI tag (e.g., `cp313`)"
        " and only the following versions of pywin32 are available:\n"
        "hint: Wheels are available for `pywin32` (v312) on the following platforms: `win32`\n"
    ),
    "numpy": (
        "hint: You require CPython 3.13 (`cp313`), but we only found wheels for `numpy` (v1.10.3)"
        " with the following Python ABI tags: `cp26m`\n"
    ),
    "a, b.c": "Because a==1 has no usable wheels and b.c[x]>=2 has no wheels with a matching\n",
}


@pytest.mark.parametrize("name", NO_WHEEL)
def test_no_wheel(make, uv, tmp_path, name):
    error = failing(make, uv, NO_WHEEL[name])
    assert error.brief == f"no wheel for the guest (Python 3.13, x86_64) of: {name}"
    assert error.stage == "transfer"
    assert error.details == NO_WHEEL[name].strip()
    assert "vm_requirements" in error.remedy
    assert left_in(tmp_path / "cache") == []


PURE = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"
COMPILED = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n"
SOURCES_ONLY = "Because all versions of plain have no usable wheels\n"


def plain(folder, monkeypatch, wheel=PURE):
    """A distribution that was built here."""
    host = Host(folder)
    record = (
        "plain/__init__.py,,\nplain/data.txt,,\n../../bin/plain,,\nplain-1.0.dist-info/METADATA,,\n"
    )
    host.add("plain", WHEEL=wheel, RECORD=record + "plain-1.0.dist-info/RECORD,,\n")
    (folder / "plain").mkdir()
    (folder / "plain/__init__.py").write_text("x = 1\n")
    (folder / "plain/data.txt").write_text("data")
    monkeypatch.syspath_prepend(str(folder))
    return host


def test_what_is_pure_and_installed_here_needs_no_wheel_of_the_index(
    make, uv, tmp_path, monkeypatch
):
    plain(tmp_path / "here", monkeypatch)
    seen: list[Any] = []

    def make_wheel(*args):
        seen.append(distributions.make_wheel(*args))
        shutil.copy(seen[0], tmp_path)
        return seen[0]

    monkeypatch.setattr(environment_module, "make_wheel", make_wheel)
    uv.refuse(SOURCES_ONLY)
    make()
    assert [it.name for it in seen] == ["plain-1.0-py3-none-any.whl"]
    assert uv.read("links") == [str(seen[0])] * 2  # for resolving, and for installing
    assert make.told == []
    with zipfile.ZipFile(tmp_path / seen[0].name) as packed:
        assert packed.read("plain/__init__.py") == b"x = 1\n"
        assert sorted(packed.namelist()) == [
            *(f"plain-1.0.dist-info/{it}" for it in ("METADATA", "RECORD")),
            *("plain/__init__.py", "plain/data.txt"),
        ]


def test_what_is_compiled_is_left_out_if_nobody_imports_it(make, uv, tmp_path, monkeypatch):
    plain(tmp_path / "here", monkeypatch, COMPILED)
    uv.refuse(SOURCES_ONLY)
    make(Requirements(root=tmp_path, lines=("pytest>=8.4", "Plain>=1")))
    assert uv.read("asked") == ["pytest>=8.4"]
    assert uv.read("overrides") == ["plain ; python_version < '3'"]
    assert [it.partition(":")[0] for it in make.told] == ["plain is not installed in guests"]


def test_what_is_compiled_and_imported_is_an_error(make, uv, tmp_path, monkeypatch):
    plain(tmp_path / "here", monkeypatch, COMPILED)
    importlib.import_module("plain")
    try:
        assert "of: plain" in failing(make, uv, SOURCES_ONLY).brief
    finally:
        del sys.modules["plain"]
    assert len(uv.calls()) == 1


@pytest.mark.parametrize("wheel", [PURE, COMPILED], ids=["pure", "compiled"])
def test_what_is_not_here_is_built(make, uv, tmp_path, wheel):
    sources = Host(uv.folder / "sources")
    sources.add("plain", WHEEL=wheel, RECORD="plain-1.0.dist-info/METADATA,,\nplain.py,,\n")
    (sources.folder / "plain.py").touch()
    requirements = Requirements(root=tmp_path, lines=("pytest>=8.4", "plain==1.0"))
    uv.refuse(SOURCES_ONLY)
    if wheel == PURE:
        make(requirements)
        assert uv.read("links")[0].endswith("/plain-1.0-py3-none-any.whl")
    else:
        with pytest.raises(TransferError, match="no wheel for the guest"):
            make(requirements)
    (call,) = [it for it in uv.calls() if "--no-binary" in it]
    assert call.endswith(" plain==1.0")
    assert "--only-binary" not in call


def test_nothing_is_built_offline(make, uv):
    assert "of: plain" in failing(make, uv, SOURCES_ONLY, offline=True).brief
    assert len(uv.calls()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Packages were unavailable because the network was\ndisabled. When the",
        "Remote Git fetches are not allowed because network connectivity is disabled (i.e., with",
        "Network connectivity is disabled, but the requested data wasn't found in the cache: https:",
        "Network connectivity is disabled, but a remote requirements file was requested: https:",
    ],
    ids=["packages", "git", "a file", "requirements"],
)
def test_offline(make, uv, text):
    error = failing(make, uv, text, offline=True)
    assert "offline" in error.brief
    assert "without --vm-offline" in error.remedy
    assert "--offline" in uv.calls()[0]


def test_any_other_failure(make, uv):
    error = failing(make, uv, "\x1b[31merror: " + "x" * 20_000)
    assert error.details.startswith("error: x")
    assert len(error.details) < 8_100


def test_uv_ends_without_a_word(make, uv):
    assert failing(make, uv, "").details == "uv ended with status 1"


def test_uv_is_missing(make, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uv", None)
    with pytest.raises(TransferError, match="uv is missing") as caught:
        make()
    assert "pip install uv" in caught.value.remedy


def test_no_place_for_it(tmp_path, uv):
    (tmp_path / "cache").touch()
    requirements = Requirements(root=tmp_path, lines=())
    prepared = prepare(requirements, PYTHON, offline=False, say=print)
    with pytest.raises(CacheError, match="the cache cannot be used") as caught, prepared:
        pass
    assert "VMSANDBOX_CACHE" in caught.value.remedy


def test_the_disk_is_full(make, uv, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(CacheError, match="No space left"):
        make()
    assert left_in(tmp_path / "cache") == []
