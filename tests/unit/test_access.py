"""The way into a guest for other tools: what OpenSSH itself makes of it."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pytest_vmsandbox.guests.reaching.access import SSHAccess

pytestmark = pytest.mark.skipif(not shutil.which("ssh"), reason="there is no OpenSSH client here")


@pytest.fixture(params=["plain", "with spaces", "100%h"])
def access(request, tmp_path):
    folder = tmp_path / request.param
    folder.mkdir()
    return SSHAccess(
        host="127.0.0.1",
        port=22022,
        user="me",
        key_file=folder / "key",
        known_hosts_file=folder / "known_hosts",
    )


def understood(*argv):
    """The options that OpenSSH takes from a command line."""
    done = subprocess.run(["ssh", "-G", *argv], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


@pytest.fixture(params=["command", "config"])
def options(request, access, tmp_path):
    if request.param == "command":
        return understood(*shlex.split(access.command)[1:])
    (tmp_path / "config").write_text(access.config("debian-13-1"))
    return understood("-F", str(tmp_path / "config"), "debian-13-1")


def test_openssh_understands_it(access, options):
    files = {"identityfile": access.key_file, "userknownhostsfile": access.known_hosts_file}
    for option, path in files.items():
        assert Path(options[option].strip('"').replace("%%", "%")) == path
    rest = {
        "hostname": "127.0.0.1",
        "port": "22022",
        "user": "me",
        "identitiesonly": "yes",
        "stricthostkeychecking": "true",
        "loglevel": "ERROR",
    }
    assert rest.items() <= options.items()
