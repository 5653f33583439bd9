"""What guests are asked for, and with what."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.core.errors import ConfigError, LaunchError, VMSandboxError
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests import backend as backend_module
from pytest_vmsandbox.guests.backend import Backend
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.provision import Provision
from pytest_vmsandbox.machine import host
from pytest_vmsandbox.machine.accelerator import Verdict
from support import images


@pytest.fixture
def image_path(tmp_path):
    folder = tmp_path / "images" / "own"
    images.define(folder, images.toml(memory_min="64MiB", user="debian"))
    return (tmp_path / "images",)


class TestNames:
    def test_are_hostnames_without_dots(self, tmp_path):
        backend = Backend(Settings(cache=tmp_path), Announcer(), ExitStack())
        images = ["debian-13", "ubuntu-24.04", "debian-13_arm64", "ubuntu-24-04", "x" * 80]
        names = [backend.name(image) for image in images]
        assert names[:3] == ["debian-13-1", "ubuntu-24-04-1", "debian-13-arm64-1"]
        assert names[3] == "ubuntu-24-04-2"
        assert len(names[4]) <= 63


class TestWhatIsNoImage:
    @pytest.mark.parametrize("value", [42, None, b"tiny", ["tiny"]])
    def test_is_refused(self, image_path, value):
        with GuestFactory.open(Settings(image_path=image_path)) as factory:
            with pytest.raises(ConfigError, match="is not an image"), factory.boot(value):
                pass
            if value is not None:
                with pytest.raises(ConfigError, match="is not an image"):
                    factory.prepare(value, print, depends_on=[])


def test_one_image_is_one_kind_of_guest_however_its_name_is_spelled(image_path):
    step = Provision(name="x", depends_on=[], run=print).step()
    with GuestFactory.open(Settings(image_path=image_path)) as factory:
        long, short = (factory.with_step(name, step) for name in ("own_amd64", "own"))
        assert long == short
        assert long.image == "own"
        with pytest.raises(ConfigError, match="there is no image 'own_arm64'"):
            factory.with_step("own_arm64", step)


class TestUser:
    @pytest.mark.parametrize(
        ("default", "wish", "user"),
        [
            (Hardware(), {}, "debian"),
            (Hardware(user="root"), {}, "root"),
            (Hardware(user="root"), {"user": "tester"}, "tester"),
            (Hardware(), {"user": "root"}, "root"),
        ],
    )
    def test_is_the_image_s_where_nobody_is_named(self, image_path, default, wish, user):
        settings = Settings(image_path=image_path, hardware=default)
        with GuestFactory.open(settings) as factory:
            assert factory.hardware("own", wish).user == user


class TestHardware:
    def test_is_one_however_its_size_is_written(self, image_path):
        with GuestFactory.open(Settings(image_path=image_path)) as factory:
            kinds = {factory.hardware("own", {"memory": size}) for size in ("1GiB", "1024MiB")}
        assert len(kinds) == 1

    def test_has_the_run_s_default_where_nothing_is_named(self, image_path):
        settings = Settings(image_path=image_path, hardware=Hardware(cpus=2, network="nat"))
        with GuestFactory.open(settings) as factory:
            assert factory.hardware("own", {"cpus": 4, "network": None}) == Hardware(
                cpus=4, network="nat", user="debian"
            )


class TestDescription:
    """One short line for each run; two kernels, or two workers, may have two long reasons."""

    @pytest.mark.parametrize(
        ("accelerator", "reason", "line"),
        [
            ("kvm", "proven: a kernel ran its first program", "kvm (proven)"),
            ("tcg", "as asked for", "tcg (as asked for); timeouts ×10"),
            (
                "tcg",
                "kvm is here but does not run guests: proof: QEMU stopped, 18 s after power-on",
                "tcg (kvm is here but does not run guests); timeouts ×10; see 'vmsandbox doctor'",
            ),
            (
                "tcg",
                "/dev/kvm is not open to this user; add the user to its group: sudo usermod -aG kvm $USER",
                "tcg (/dev/kvm is not open to this user); timeouts ×10; see 'vmsandbox doctor'",
            ),
            (
                "tcg",
                "there is no /dev/kvm: virtualization is turned off, or this is a virtual machine",
                "tcg (there is no /dev/kvm); timeouts ×10; see 'vmsandbox doctor'",
            ),
        ],
    )
    def test_a_line(self, image_path, monkeypatch, accelerator, reason, line):
        verdict = Verdict(accelerator=accelerator, processor="max", reason=reason)
        monkeypatch.setattr(backend_module, "find_qemu", lambda _: SimpleNamespace(release="10.0"))
        monkeypatch.setattr(Backend, "accelerator", lambda *_: verdict)
        with GuestFactory.open(Settings(image_path=image_path)) as factory:
            assert factory.backend.describe("own") == f"vmsandbox: QEMU 10.0, {line}"


class TestLoopback:
    def test_is_looked_at_before_anything_is_started(self, image_path, monkeypatch):
        monkeypatch.setattr(host, "loopback_problem", lambda: "Network is unreachable")
        monkeypatch.setattr(Backend, "built", lambda *_: None)
        monkeypatch.setattr(backend_module, "find_qemu", lambda *_: None)
        monkeypatch.setattr(Backend, "require", lambda *_: (None, None))
        with GuestFactory.open(Settings(image_path=image_path)) as factory:
            for ask in (
                lambda: factory.backend.describe("own"),
                lambda: factory.prepare("own", print, depends_on=[]),
            ):
                with pytest.raises(LaunchError, match="127.0.0.1 cannot be reached"):
                    ask()
            assert "hypervisor" not in vars(factory.backend)


class TestOffline:
    @pytest.fixture
    def factory(self, image_path):
        with GuestFactory.open(Settings(image_path=image_path, offline=True)) as factory:
            yield factory

    def test_no_guest_has_the_network(self, factory):
        with pytest.raises(ConfigError, match="--vm-offline"), factory.boot("own", network="nat"):
            pass

    def test_nor_one_that_is_prepared(self, factory):
        blueprint = SimpleNamespace(hardware=Hardware(network="nat"))
        with pytest.raises(ConfigError, match="--vm-offline"):
            factory.backend.engine(SimpleNamespace(blueprint=blueprint))

    def test_an_isolated_one_is_none_of_its_business(self, factory):
        with pytest.raises(VMSandboxError, match="is not built"), factory.boot("own"):
            pass


def test_a_tpm_without_its_program_is_missed_before_a_guest_starts(image_path, monkeypatch):
    """Else guests would be booted because they cannot be cloned, and the reason would be a puzzle."""
    built = SimpleNamespace(
        definition=SimpleNamespace(name="own", architecture="x86_64", tpm=False, firmware="kernel"),
        kernel=Path("/kernel"),
    )
    monkeypatch.setattr(Backend, "require", lambda *_: (built, None))
    monkeypatch.setattr(Backend, "accelerator", lambda *_: None)
    monkeypatch.setattr(programs, "find", lambda _: None)
    with GuestFactory.open(Settings(image_path=image_path)) as factory:
        hardware = factory.hardware("own", {"tpm": True})
        with pytest.raises(LaunchError, match="there is no swtpm"):
            factory.backend.blueprint("own", hardware)
        assert "hypervisor" not in vars(factory.backend)
