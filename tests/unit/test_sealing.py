"""What is looked at before guests are cloned of a template; the functional tests make some."""

from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue.store import BuiltImage
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests import ssh
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.sealing import Sealer, template_key
from pytest_vmsandbox.guests.templates import TemplateStore, file_digest
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.qemu import Qemu
from support.images import DEFINITION


@pytest.fixture
def blueprint(tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "image.json").write_text("{}")
    (folder / "disk.raw").write_bytes(b"disk" * 50_000)
    return Blueprint(
        built=BuiltImage(
            definition=replace(DEFINITION, name="mine"), digest="0" * 64, folder=folder
        ),
        qemu=Qemu(path=Path("/usr/bin/qemu"), version=(9, 0, 0), build="one build"),
        verdict=Verdict(accelerator="tcg", processor="Nehalem", reason="asked for"),
        hardware=Hardware(),
        qemu_args=lambda _: (),
    )


@pytest.fixture
def store(tmp_path):
    return TemplateStore(tmp_path / "cache")


@pytest.fixture
def sealer(store):
    with Sealer.open(store, None, guest=None, logs=lambda _: None, say=print, tell=print) as sealer:
        yield sealer


@pytest.fixture
def keep(store, blueprint):
    """Puts a template of that blueprint into the store."""

    def put(disk):
        key = template_key(blueprint, ())
        with store.lock(key, lambda: None), store.incoming(key) as folder:
            (folder / "memory").write_bytes(b"m")
            (folder / "state").write_bytes(b"s")
            (folder / "key").write_text(ssh.KeyPair.generate().private)
            store.adopt(folder, key, image="mine", name="mine", disk=disk, layers=[], facts={})

    return put


class TestTheDiskOfTheImage:
    def test_is_as_it_was(self, sealer, blueprint, keep):
        keep(file_digest(blueprint.built.disk))
        assert sealer.obtain(blueprint).damage.result() == ""

    def test_has_changed(self, sealer, blueprint, keep):
        keep(file_digest(blueprint.built.disk))
        with blueprint.built.disk.open("r+b") as disk:
            disk.seek(123_456)
            disk.write(b"!")
        with pytest.raises(ImageError, match=r"disk\.raw.* has changed") as caught:
            sealer.obtain(blueprint).damage.result()
        assert caught.value.remedy == "vmsandbox images build mine --force"

    def test_cannot_be_read(self, sealer, blueprint, keep):
        keep(file_digest(blueprint.built.disk))
        blueprint.built.disk.unlink()
        with pytest.raises(ImageError, match=r"disk\.raw cannot be read: No such file") as caught:
            sealer.obtain(blueprint).damage.result()
        assert "--force" in caught.value.remedy

    def test_was_not_looked_at_when_the_template_was_made(self, sealer, blueprint, keep):
        keep("")
        assert sealer.obtain(blueprint).damage.result() == ""
