"""A plugin for a run under test: its guests are this machine, and nothing is installed in them.

Named so that it is not handed on to the guest's pytest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.provision import PreparedImage
from pytest_vmsandbox.inside import install, tree_copy
from pytest_vmsandbox.inside.connection import GuestPaths
from pytest_vmsandbox.plugin import RUN, reporting
from pytest_vmsandbox.plugin.in_vm import pulling
from support.local import LocalGuest

LAYOUT = install.layout


class Local(LocalGuest):
    """Sees nothing of how pytest was called here, as a real guest would not."""

    spec = SimpleNamespace(user="root")
    facts = None
    is_on = True

    def screenshot(self, path):
        path.write_bytes(b"a picture")

    def run(self, argv, **how):
        if argv[:2] == ["sh", "-c"] and "serve" in argv[2]:
            kept = {name: value for name, value in os.environ.items() if not _is_ours(name)}
            argv = ["env", "-i", *(f"{name}={value}" for name, value in kept.items()), *argv]
        return super().run(argv, **how)


def _is_ours(name):
    return name.startswith(("PYTEST_", "PYTHON", "COV"))


class LocalCluster(dict):
    def seal(self):
        raise ConfigError("this machine cannot be sealed")


class LocalFormed(NamedTuple):
    machines: dict
    form: Callable


class LocalFactory:
    def __init__(self, session, folder):
        self.session, self.folder, self.count = session, folder, 0
        self.images_used = []
        self.backend = self

    def describe(self, image):
        return f"vmsandbox: this machine plays {image}"

    def require(self, image):
        pass

    def own(self, folder):
        pass

    def patience(self, image):
        return 1.0

    def expect(self, image, hardware, count=1):
        pass

    def with_nothing(self, image):
        return PreparedImage(image=image, steps=()) if isinstance(image, str) else image

    def with_step(self, image, step):
        image = self.with_nothing(image)
        return PreparedImage(image=image.image, steps=(*image.steps, step))

    def prepare_cluster(self, machines, form, depends_on, **more):
        return LocalFormed(machines, form)

    @contextmanager
    def cluster(self, machines, networks=None):
        form = None
        if isinstance(machines, LocalFormed):
            machines, form = machines.machines, machines.form
        with ExitStack() as stack:
            guests = LocalCluster()
            for name, made_of in machines.items():
                image = self.with_nothing(made_of["image"])
                guests[name] = stack.enter_context(self.lease(image, Hardware(), hostname=name))
            if form is not None:
                form(guests)
            yield guests

    @contextmanager
    def lease(self, prepared, hardware, hostname="", networks=()):
        image = prepared.image
        assert isinstance(hardware, Hardware)
        self.count += 1
        guest = Local(f"{hostname or image}-{self.count}", image)
        self.session.guest_begun(guest.name)
        (self.session.logs(guest.name) / "console.log").write_text(f"{guest.name} boots")
        for step in prepared.steps:
            guest.facts = step.run(guest)
        self.session.guest_ready(guest)
        error = None
        try:
            yield guest
        except BaseException as raised:
            error = raised
            raise
        finally:
            try:
                self.session.guest_stopping(guest, error)  # which users' hooks may fail
            finally:
                end_all(f"{self.folder / guest.name}/")

    def install_environment(self, guest, payload):
        base = self.folder / guest.name
        base.mkdir()
        (base / "session.ini").write_text("[pytest]\n")

    def install_project(self, guest, payload):
        if "LOCAL_COPY" in os.environ:  # else the tree is where it is
            there = self.layout(guest, payload)
            tree_copy.push(guest.engine.stream_script, payload.tree, there.tree)
            for tree in payload.outside:
                tree_copy.push(guest.engine.stream_script, tree, there.outside[str(tree.root)])

    def layout(self, guest, payload):
        base = self.folder / (guest.name if guest else "nobody")
        root = payload.project.root
        install.BASE = str(base)
        python = os.environ.get("LOCAL_PYTHON", sys.executable)
        installed = replace(
            LAYOUT(guest, payload),
            place=GuestPaths(python=python, runner=str(install.RUNNER), folder=str(base / "run")),
            programs=str(Path(python).parent),
        )
        if "LOCAL_COPY" in os.environ:
            return installed
        path = tuple(os.path.normpath(root / it) for it in payload.project.import_roots)
        return replace(installed, tree=str(root), path=path, outside={})


def end_all(word):
    """End the processes on whose command line is a word: supervisors, and their sessions."""
    while any(_end(entry, word) for entry in Path("/proc").iterdir()):
        pass  # until there is none: one of them may have forked meanwhile


def _end(entry, word):
    """End a process if it is one of these; whether it was."""
    if not entry.name.isdecimal() or int(entry.name) == os.getpid():
        return False
    try:
        line = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        if "serve" not in line or not any(it.startswith(word) for it in line):
            return False
        os.kill(int(entry.name), signal.SIGKILL)
    except OSError:
        return False
    return True


# Ends what is left of a pytest that was killed: its guests are processes of nobody.
WARDEN = """
cat
while pids=$(grep -lsz "^$1/" /proc/[0-9]*/cmdline); [ "$pids" ]; do
    for pid in $pids; do pid=${pid#/proc/}; kill -KILL "${pid%/*}"; done
done
rm -rf "$1"
"""


@contextmanager
def own_folder():
    """A folder for guests. However this process ends, the folder goes, and with it what runs there."""
    folder = tempfile.mkdtemp(prefix="local-", dir="/tmp")
    warden = subprocess.Popen(
        ["sh", "-c", WARDEN, "sh", folder], start_new_session=True, stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with warden:  # which closes its standard input, and waits
        yield Path(folder)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    reporting._HIDDEN += (f"{Path(__file__).parent}{os.sep}",)  # it stands in for ours
    session = config.stash[RUN]
    folder = session._stack.enter_context(own_folder())
    session.factory = LocalFactory(session, folder)
    session._gatherer._ask = lambda guest: {"processes.txt": f"those of {guest.name}"}
    for name in ("install_environment", "install_project", "layout"):
        setattr(install, name, getattr(session.factory, name))
    if "LOCAL_COPY" not in os.environ:  # the guest's copy of the project is the project
        pulling.bring_back = lambda *_: {}
