"""The first boot of a system from elsewhere, as far as it needs no guest; tests/functional/test_adopted.py has more."""

import io
import json
import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pycdlib
import pytest

from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.guests.images import adopting, changing, examining, root_disk
from pytest_vmsandbox.guests.images.seed import seed
from pytest_vmsandbox.guests.reaching.access import KeyPair
from support.images import DEFINITION

KEY = KeyPair.generate()


class TestSeed:
    def test_what_cloud_init_reads(self):
        iso = pycdlib.PyCdlib()
        iso.open_fp(io.BytesIO(seed("some-image", KEY.public)))
        label = iso.pvd.volume_identifier.decode().strip()
        found = {}
        for name in ("user-data", "meta-data"):
            stream = io.BytesIO()
            iso.get_file_from_iso_fp(stream, rr_path=f"/{name}")
            found[name] = stream.getvalue().decode()
        iso.close()
        assert label == "cidata"
        first, _, values = found["user-data"].partition("\n")
        assert first == "#cloud-config"
        assert json.loads(values)["ssh_authorized_keys"] == [KEY.public]
        assert json.loads(values)["disable_root"] is False
        assert json.loads(found["meta-data"])["local-hostname"] == "some-image"


class TestWhatIsDoneInTheGuest:
    """The script, with a folder in the place of the root file system."""

    @pytest.fixture
    def root(self, tmp_path):
        """A small system, and what plays its programs."""
        for name, content in {
            "etc/passwd": f"root:x:0:0:root:{tmp_path}/root:/usr/sbin/nologin\n"
            f"vagrant:x:1000:1000::{tmp_path}/home/vagrant:/bin/sh\n",
            "etc/shadow": "root:!:19000::::::\nvagrant:x:19000::::::\n",
            "etc/ssh/sshd_config": "PermitRootLogin no\nAllowUsers vagrant\nHostKey /etc/other\n",
            "etc/cloud/cloud.cfg": "",
            "home/vagrant/.ssh/authorized_keys": "ssh-rsa AAAA insecure\n",
            "home/vagrant/.ssh/authorized_keys2": "ssh-rsa AAAA insecure\n",
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        bin_ = tmp_path / "bin"
        bin_.mkdir()
        for program in ("cloud-init", "chown", "usermod", "ssh-keygen", "systemctl", "restorecon"):
            (bin_ / program).write_text(f'#!/bin/sh\necho "{program} $*" >>{tmp_path}/calls\n')
            (bin_ / program).chmod(0o755)
        return tmp_path

    def adopt(self, root, user="vagrant"):
        script = adopting._ADOPT.replace("/etc/", f"{root}/etc/")
        script = script.replace(f"HostKey {root}", "HostKey ")  # the text in the file
        subprocess.run(
            ["/bin/sh", "-c", script, "sh", KEY.public, user],
            check=True,
            env={**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}"},
        )
        return (root / "calls").read_text()

    def test_only_our_key_is_left(self, root):
        self.adopt(root)
        for home in ("root", "home/vagrant"):
            folder = root / home / ".ssh"
            assert (folder / "authorized_keys").read_text() == f"{KEY.public}\n"
            assert (folder / "authorized_keys").stat().st_mode & 0o777 == 0o600
            assert [path.name for path in folder.iterdir()] == ["authorized_keys"]

    def test_root_may_log_in(self, root):
        calls = self.adopt(root)
        lines = (root / "etc/ssh/sshd_config").read_text().splitlines()
        # The first value of a key counts, and each AllowUsers.
        assert lines.index("PermitRootLogin without-password") < lines.index("PermitRootLogin no")
        assert "AllowUsers root vagrant" in lines
        assert "HostKey /etc/ssh/ssh_host_ed25519_key" in [
            line.replace("  ", " ") for line in lines
        ]
        assert "usermod -p * root" in calls
        assert "usermod -s /bin/sh root" in calls
        assert "ssh-keygen -q -t ed25519" in calls
        assert "systemctl reload ssh" in calls

    def test_root_may_log_in_where_there_is_no_usermod(self, root):
        (root / "bin" / "usermod").write_text("#!/bin/sh\nexit 127\n")
        self.adopt(root)
        assert (root / "etc/shadow").read_text().startswith("root:*:19000::")
        first = (root / "etc/passwd").read_text().splitlines()[0]
        assert first == f"root:x:0:0:root:{root}/root:/bin/sh"

    def test_cloud_init_ends_and_does_not_come_again(self, root):
        assert self.adopt(root).startswith("cloud-init status --wait\n")
        assert (root / "etc/cloud/cloud-init.disabled").exists()


class TestOutput:
    @pytest.fixture
    def written(self, monkeypatch):
        monkeypatch.setattr(changing, "LONGEST_LINE", 10)
        return []

    def test_lines(self, written):
        build: Any = SimpleNamespace(write=written.append)
        lines = changing.Lines(build)
        for data in (b"one\ntw", b"o\n", b"x" * 11, b"three"):
            lines.feed(data)
        lines.end()
        lines.end()
        assert written == [b"one\n", b"two\n", b"x" * 11 + b"\n", b"three\n"]


def guest_with(output, *, helper=True):
    result = SimpleNamespace(stdout=output)
    engine = SimpleNamespace(has_helper=helper)
    return SimpleNamespace(run=lambda *_, **__: result, engine=engine)


class TestExamining:
    def test_what_is_so(self):
        guest = guest_with("python=3.11.2\ninit=systemd\nuser=yes\n")
        assert examining.check(guest, DEFINITION) == {
            "found": {"python": "3.11.2", "init": "systemd", "helper": True}
        }

    @pytest.mark.parametrize(
        ("output", "changes", "key"),
        [
            ("python=3.6.8\ninit=systemd\nuser=yes\n", {}, "system.python = true"),
            ("init=systemd\nuser=yes\n", {}, "system.python = true"),
            (
                "python=3.1.1\ninit=systemd\nuser=yes\n",
                {"python_version": "3.11"},
                "system.python = '3.11'",
            ),
            ("python=3.12.0\ninit=openrc\nuser=yes\n", {}, "system.init = 'systemd'"),
            ("python=3.12.0\ninit=systemd\n", {"user": "app"}, "system.user = 'app'"),
        ],
    )
    def test_a_false_statement(self, output, changes, key):
        definition = replace(DEFINITION, **changes)
        with pytest.raises(ImageError, match="says what is not so") as raised:
            examining.check(guest_with(output), definition)
        assert raised.value.details.startswith(key)

    def test_the_script(self):
        done = subprocess.run(
            ["/bin/sh", "-c", examining._LOOK, "sh", "root"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "user=yes\n" in done.stdout
        assert "python=3." in done.stdout


@pytest.mark.parametrize(
    "script", [adopting._ADOPT, examining._LOOK, examining._PACKAGES, root_disk._GROW]
)
def test_scripts_are_for_any_shell(script):
    subprocess.run(["/bin/sh", "-n", "-c", script], check=True)
