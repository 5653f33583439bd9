"""A suite of tests that runs in a pytest of its own, on images and guests that are fakes."""

import os
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import store
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.guests.faults import fault
from support import images
from support.environment import WITHOUT_HYPOTHESIS

# pytester forgets what a run in this process imports: what takes long to import is kept.
assert store
assert fault

IMAGES = {
    "alpha-1": native_architecture(),
    "alpha-2": native_architecture(),
    "beta": native_architecture(),
    "foreign": "aarch64" if native_architecture() == "x86_64" else "x86_64",
}
INI = """\
[pytest]
vm_image_path = images
vm_images = alpha-1
"""
# The fake writes what happens to guests into the file `guests`, also from several processes.
FAKE = """
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.core.errors import BootError, MonitorError
from pytest_vmsandbox.core.spec import Hardware, format_size
from pytest_vmsandbox.guests.faults.fault import Fault
from pytest_vmsandbox.guests.running.ledger import Ledger
from pytest_vmsandbox.plugin import RUN


def note(config, *words):
    with (config.rootpath / "guests").open("a") as file:
        print(*words, file=file)


class FakeFault(Fault):
    def _start(self):
        pass

    def _stop(self):
        note(self._engine.config, "restore", self._engine.name, self.text)
        if "stays" in self.text:
            raise MonitorError(f"QEMU refuses:\\n{self.text}")


class FakeGuest:
    def __init__(self, name, image, config, logs):
        self.name, self.image, self.alive, self.config = name, image, True, config
        self.engine = self
        self.machines, self.running = SimpleNamespace(faults=Ledger(logs), cards=[]), None
        self.explained = nullcontext

    def fault(self, text):
        return FakeFault(self, text).begin()

    def screenshot(self, path):
        path.write_bytes(b"a picture")


class FakeFactory:
    images_used = ()

    def __init__(self, session):
        self.session, self.count = session, 0
        self.backend = self

    def describe(self, image):
        return f"vmsandbox: a fake runs {image}"

    def own(self, folder):
        pass

    def note(self, *words):
        note(self.session.config, *words)

    def boot(self, image, **hardware):
        return self.lease(image, Hardware(user="root").changed(hardware))

    def prepare_cluster(self, machines, form, depends_on, **more):
        self.note("form", form.__name__, *depends_on)
        return SimpleNamespace(sealed=machines)

    @contextmanager
    def cluster(self, machines, **more):
        self.note("cluster", *(f"{k}={v}" for k, v in more.items()))
        machines = getattr(machines, "sealed", machines)
        with ExitStack() as stack:
            guests = {}
            for name, made_of in machines.items():
                hardware = dict(made_of) if isinstance(made_of, dict) else {"image": made_of}
                image = hardware.pop("image")
                spec = Hardware(user="root").changed(hardware)
                guests[name] = stack.enter_context(self.lease(image, spec, hostname=name))
            yield guests

    @contextmanager
    def network(self, name):
        self.note("network", name)
        yield name
        self.note("network ends", name)

    @contextmanager
    def lease(self, image, spec, hostname="", networks=()):
        usual = Hardware(user="root")
        hardware = {
            name: value for name, value in vars(spec).items() if value != getattr(usual, name)
        }
        for name in {"memory", "disk"} & {*hardware}:
            hardware[name] = format_size(hardware[name])
        self.count += 1
        name, config = f"{hostname or image}-{self.count}", self.session.config
        self.note(
            *("boot", name, *(f"{k}={v}" for k, v in sorted(hardware.items()))),
            *(f"on {network}" for network in networks),
        )
        self.session.guest_begun(name)
        logs = self.session.logs(name)
        guest = FakeGuest(name, image, config, logs)
        (logs / "console.log").write_text(f"{guest.name} boots")
        if image == "beta" and hardware.get("cpus") == 13:
            raise BootError("beta does not come up", stage="kernel", seconds=3)
        self.session.guest_ready(guest)
        error = None
        try:
            yield guest
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.session.guest_stopping(guest, error)
            self.note("end", guest.name)


class FakeKeeper:
    def __init__(self, session):
        self.note, self.there = session.factory.note, {}
        self.fails = None
        self.interrupted = False

    def keep_all(self, moments):
        found = []
        for guest, moment in moments.items():
            try:
                found.append(self.keep(guest, moment))
            except Exception as error:
                found.append(error)
        return found

    def keep(self, guest, moment):
        key = f"{moment.nodeid}#{moment.number}"
        error = moment.error or moment.outcome
        changed = () if guest.alive is True else (guest.alive,)
        self.note("keep", guest.name, moment.number, moment.phase, error, *changed)
        if self.fails is not None:
            raise self.fails
        group = SimpleNamespace(guests=["a", "b"]) if "network" in moment.nodeid else None
        kept = SimpleNamespace(size_on_disk=3 << 20, group=group)
        self.there[key] = SimpleNamespace(
            key=key, moment=moment, guest=guest.name, kept=kept, error=None
        )
        if self.interrupted:
            raise KeyboardInterrupt
        return key

    def forget(self, key):
        self.note("forget", key.partition("::")[2])
        del self.there[key]

    def close(self):
        return list(self.there.values())


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    session = config.stash[RUN]
    session.factory = FakeFactory(session)
    session.keeping.keeper = FakeKeeper(session)
    session.keeping.size_of_all = lambda: 1 << 30
    session.keeping.size_of = lambda key: None if "removed" in key else 3 << 20
    session._gatherer._ask = lambda guest: {"processes.txt": f"those of {guest.name}"}
"""


class Suite:
    """A folder with tests of a user, and ways to run pytest on it."""

    def __init__(self, pytester):
        self.pytester = pytester
        self.path: Path = pytester.path

    def write(self, source, name="test_suite"):
        return self.pytester.makepyfile(**{name: source})

    def ini(self, text):
        (self.path / "pytest.ini").write_text(text)

    def run(self, *args):
        """Run in this process, with no other plugin: that is quicker."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
            return self.pytester.runpytest_inprocess(
                *("-p", "no:cacheprovider", "-p", "pytest_vmsandbox.plugin", *args)
            )

    def run_apart(self, *args):
        """Run in a process of its own: what it imports stays there."""
        plugins = (*WITHOUT_HYPOTHESIS, "-p", "no:cacheprovider")
        return self.pytester.runpytest_subprocess(*plugins, *args, timeout=300)

    def check(self, source, *args, apart=False, **outcomes):
        """Write and run tests, which must end like this; what happened to guests. The result is in `result`."""
        self.write(source)
        self.result = (self.run_apart if apart else self.run)(*args)
        self.result.assert_outcomes(**outcomes)
        return self.guests

    def ids(self, *args):
        """The tests that are collected, in order."""
        lines = self.run("--collect-only", "-q", *args).outlines
        return [line.partition("::")[2] for line in lines if "::" in line]

    def usage_error(self, *args):
        """Run what must be a usage error; its text."""
        result = self.run(*args)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert "Traceback" not in result.stderr.str()
        return result.stderr.str()

    @property
    def guests(self):
        """What happened to guests, line by line."""
        file = self.path / "guests"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def bare(pytester, monkeypatch):
    """A suite with images of its own, none of them built."""
    for name in list(os.environ):
        if name.startswith(("VMSANDBOX_", "PYTEST_")) or name == "CI":
            monkeypatch.delenv(name)
    monkeypatch.setenv("VMSANDBOX_CACHE", str(pytester.path / "cache"))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(pytester.path / "runtime"))
    for name, architecture in IMAGES.items():
        definition = images.toml(architecture=architecture, requires='["sh"]')
        images.define(pytester.path / "images" / name, definition)
    # pytester makes the project's folder the home folder, too; such a one goes to no guest.
    monkeypatch.setenv("HOME", str(pytester.path.parent / "home"))
    suite = Suite(pytester)
    suite.ini(INI)
    return suite


@pytest.fixture
def suite(bare):
    """Likewise, with a fake that boots guests."""
    bare.pytester.makeconftest(FAKE)
    return bare
