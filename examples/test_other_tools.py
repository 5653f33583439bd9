"""Other tools get into a guest by SSH: scp, testinfra, Ansible.

They need pytest-testinfra. Ansible is run by uv, which installs it where nothing else sees it.
"""

from __future__ import annotations

import os
import subprocess

import pytest
import testinfra

pytestmark = pytest.mark.vm("debian-13", isolation="module")

PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - name: The message of the day is ours
      lineinfile:
        path: /etc/motd
        line: "Welcome to {{ inventory_hostname }}"
        create: true
"""


@pytest.fixture
def config(vm, tmp_path):
    """A configuration of OpenSSH in which the guest is called by its name."""
    vm.ssh_config(tmp_path / "ssh_config")
    return tmp_path / "ssh_config"


def test_scp(vm, config, tmp_path):
    (tmp_path / "sent").write_text("over there and back")
    for source, dest in ("sent", f"{vm.name}:copy"), (f"{vm.name}:copy", "received"):
        subprocess.run(["scp", "-F", config, source, dest], cwd=tmp_path, check=True)
    assert (tmp_path / "received").read_text() == "over there and back"


def test_testinfra(vm, config):
    host = testinfra.get_host(f"ssh://{vm.name}", ssh_config=str(config))
    assert host.system_info.distribution == "debian"
    assert host.file("/etc/shadow").mode == 0o640
    assert host.service("ssh").is_running


def test_ansible(vm, config, tmp_path):
    access = vm.ssh
    (tmp_path / "playbook.yml").write_text(PLAYBOOK)
    (tmp_path / "inventory").write_text(
        f"{vm.name} ansible_host={access.host} ansible_port={access.port} ansible_user={access.user}"
        " ansible_python_interpreter=/usr/bin/python3"
        f" ansible_ssh_private_key_file={access.key_file}"
        f" ansible_ssh_common_args='-o UserKnownHostsFile={access.known_hosts_file}'\n"
    )
    settings = {
        "ANSIBLE_HOME": str(tmp_path),
        "ANSIBLE_PIPELINING": "1",
        "ANSIBLE_SSH_ARGS": "-F none",  # no connection that outlives it
    }
    argv = ["uv", "tool", "run", "--from", "ansible-core", "ansible-playbook"]
    subprocess.run(
        [*argv, "-i", "inventory", "playbook.yml"],
        cwd=tmp_path,
        env=os.environ | settings,
        check=True,
    )
    assert f"Welcome to {vm.name}\n" in vm.read_text("/etc/motd")
