"""A cache that was copied, or restored by a CI service: its templates are found, whoever it belongs to."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pytest_vmsandbox.core.paths import cache_dir

NOBODY = pwd.getpwnam("nobody")
# A run of its own, perhaps of another user. What is proven of an accelerator does not matter here.
RUN = """
import sys
from pathlib import Path
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory

cache, runtime = map(Path, sys.argv[1:])
settings = Settings(cache=cache, runtime=runtime, accelerator="tcg", clones="demand")
with (
    GuestFactory.open(settings, Announcer(lambda line: print("told:", line))) as factory,
    factory.boot("tiny", memory="160MiB") as vm,
):
    assert vm.run(["hostname"]).stdout.strip() == vm.name
    print(vm.engine.origin)
"""


def run(cache, *who, **env):
    """Have a guest of the image `tiny`; what was told, and how the guest came to be."""
    argv = [*who, sys.executable, "-c", RUN, str(cache), str(cache.parent / "runtime")]
    done = subprocess.run(
        argv, cwd="/", env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def as_nobody():
    """The start of a command line; nobody can read this Python and the checkout, at least.

    Without that bit among the secure ones, access(2) would not count what a capability allows.
    """
    who = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]
    reads_all = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    reads_all.append("--securebits=+no_setuid_fixup")
    script = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import pytest_vmsandbox'], check=True)\n"
    )
    works = subprocess.run([*who, sys.executable, "-c", script], check=False, capture_output=True)
    return who if works.returncode == 0 else [*who, *reads_all]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with one template."""
    cache = tmp_path_factory.mktemp("first") / "cache"
    (cache / "images").mkdir(parents=True)
    shutil.copytree(cache_dir() / "images" / "tiny", cache / "images" / "tiny")
    told, origin = run(cache)
    assert told.startswith("told: preparing tiny")
    assert origin == "cloned"
    return cache


@pytest.fixture
def place():
    """A folder that each user can reach, which is not so of `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # it is private, and short
        yield Path(name)


def test_by_tar(cache, place):
    """Without holes, and with other times."""
    (place / "cache").mkdir()
    command = f"tar -C {cache} -cf - . | tar -C {place}/cache --touch -xf -"
    subprocess.run(["sh", "-c", command], check=True)
    (memory,) = (place / "cache").glob("templates/*/memory")
    assert memory.stat().st_blocks * 512 >= memory.stat().st_size
    assert run(place / "cache") == ["cloned"]


def test_by_cp_with_a_narrow_umask(cache, place):
    subprocess.run(["sh", "-c", f"umask 077; cp -r {cache} {place}"], check=True)
    assert run(place / "cache") == ["cloned"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_by_another_user(cache, place):
    who = as_nobody()
    os.chown(place, NOBODY.pw_uid, NOBODY.pw_gid)
    with subprocess.Popen(["tar", "-C", cache, "-cf", "-", "."], stdout=subprocess.PIPE) as tar:
        argv = [*who[:4], "sh", "-c", f"mkdir {place}/cache && tar -C {place}/cache -xf -"]
        subprocess.run(argv, stdin=tar.stdout, check=True)
    assert run(place / "cache", *who, HOME=str(place)) == ["cloned"]
    files = [file for file in place.rglob("*") if file.is_file()]
    assert {file.stat().st_uid for file in files} == {NOBODY.pw_uid}
