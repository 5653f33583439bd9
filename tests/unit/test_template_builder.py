"""What is looked at before guests are cloned of a template; the functional tests make some."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.cache.integrity import file_digest
from pytest_vmsandbox.catalogue.store import BuiltImage
from pytest_vmsandbox.core.errors import ImageError, LaunchError
from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests import blueprint as blueprint_module
from pytest_vmsandbox.guests.blueprint import Blueprint
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.cloning.template_builder import TemplateBuilder, doer, template_key
from pytest_vmsandbox.guests.provision import Step
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.templates import TemplateStore
from pytest_vmsandbox.machine.accelerator import Verdict
from pytest_vmsandbox.machine.qemu import Qemu
from support import damage
from support.images import DEFINITION


@pytest.fixture
def blueprint(tmp_path):
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "image.json").write_text('{"schema": 1}')
    for name in ("vmlinuz", "initrd.img", "host_key.pub"):
        (folder / name).write_text(name)
    (folder / "disk.raw").write_bytes(b"disk" * 50_000)
    return Blueprint(
        built=BuiltImage(
            definition=replace(DEFINITION, name="mine"), digest="0" * 64, folder=folder
        ),
        qemu=Qemu(path=Path("/usr/bin/qemu"), version=(9, 0, 0), build="one build"),
        verdict=Verdict(accelerator="tcg", processor="Nehalem", reason="asked for"),
        hardware=Hardware(user=DEFINITION.user),
        qemu_args=lambda _: (),
    )


@pytest.fixture
def store(tmp_path):
    return TemplateStore(tmp_path / "cache")


@pytest.fixture
def said():
    return []


@pytest.fixture
def builder(tmp_path, said):
    backend: Any = SimpleNamespace(cache=tmp_path / "cache", callbacks=Announcer(said.append))
    with TemplateBuilder(backend) as builder:
        yield builder


@pytest.fixture
def keep(store, blueprint):
    """Puts a template of that blueprint into the store."""

    def put(disk, of=None):
        def fill(folder, _lock):
            (folder / "memory").write_bytes(b"m")
            (folder / "state").write_bytes(b"s")
            (folder / "console").write_text("Linux version 6\n")
            (folder / "key").write_text(KeyPair.generate().private)
            return {"image": "mine", "name": "mine", "disk": disk, "layers": [], "facts": {}}

        return store.make(template_key(of or blueprint, ()), fill, on_busy=lambda: None)

    return put


class TestWhoDoesAStep:
    """A template is what a step has made of a guest: by the image's user, or by who is in the key."""

    @pytest.fixture
    def of_somebody(self, blueprint):
        return blueprint.with_user("somebody")

    @pytest.mark.parametrize("personal", [False, True])
    def test_the_key_tells(self, blueprint, of_somebody, personal):
        steps = [Step(digest="1", run=lambda _: None, about="", personal=personal)]
        users = {doer(it, steps[0]) for it in (blueprint, of_somebody)}
        keys = {template_key(it, steps) for it in (blueprint, of_somebody)}
        assert len(users) == len(keys) == 1 + personal

    def test_the_key_of_the_image_alone_does_not(self, blueprint, of_somebody):
        assert template_key(blueprint, []) == template_key(of_somebody, [])


class TestTheDiskOfTheImage:
    def test_is_as_it_was(self, builder, blueprint, keep):
        keep(file_digest(blueprint.built.disk))
        assert builder.obtain(blueprint).damage.result() == ""

    def test_has_changed(self, builder, blueprint, keep):
        keep(file_digest(blueprint.built.disk))
        with blueprint.built.disk.open("r+b") as disk:
            disk.seek(123_456)
            disk.write(b"!")
        with pytest.raises(ImageError, match=r"disk\.raw.* has changed") as caught:
            builder.obtain(blueprint).damage.result()
        assert caught.value.remedy == "vmsandbox images build mine --image-path=/ --force"

    def test_cannot_be_read(self, builder, blueprint, keep):
        keep(file_digest(blueprint.built.disk))
        blueprint.built.disk.unlink()
        with pytest.raises(ImageError, match=r"disk\.raw cannot be read: No such file") as caught:
            builder.obtain(blueprint).damage.result()
        assert "--force" in caught.value.remedy

    def test_was_not_looked_at_when_the_template_was_made(self, builder, blueprint, keep):
        keep("")
        assert builder.obtain(blueprint).damage.result() == ""


class TestAnotherFormat:
    """A template that was made when guests had other devices, or were prepared in another way."""

    def test_is_not_used_and_goes_first(self, blueprint, keep, store, monkeypatch):
        with monkeypatch.context() as before:
            before.setattr(blueprint_module, "FORMAT", 3)
            old = keep("", of=replace(blueprint))  # a blueprint computes its digest once
        assert store.get(template_key(blueprint, ())) is None
        os.utime(old.folder / "in-use.lock", (1, 1))
        new = keep("")
        store.shrink(limit=new.size_on_disk)
        assert [it.key for it in store.all()] == [new.key]


class TestTheImage:
    @pytest.mark.parametrize("name", ["vmlinuz", "initrd.img", "host_key.pub"])
    def test_is_checked_before_a_guest_is_handed_out(self, builder, blueprint, keep, name):
        folder = blueprint.built.folder
        names = ["vmlinuz", "initrd.img", "host_key.pub", "disk.raw"]
        digests = {it: file_digest(folder / it) for it in names}
        integrity.write_record(folder / "image.json", {"schema": 2, "digests": digests})
        keep(digests["disk.raw"])
        damage.KINDS["flipped"](folder / name)
        with pytest.raises(ImageError, match=f"{name} has changed since it was built") as caught:
            builder.obtain(blueprint).fault(again=False)
        assert caught.value.remedy == "vmsandbox images build mine --image-path=/ --force"


class TestFault:
    @pytest.fixture
    def opened(self, builder, blueprint, keep):
        keep("")
        return builder.obtain(blueprint)

    def test_none(self, opened):
        assert opened.fault(again=False) == opened.fault(again=True) == ""
        opened.check()
        opened.check_current()

    def test_of_before(self, builder, blueprint, keep, store):
        keep("")
        damage.KINDS["flipped"](store.all()[0].folder / "state")
        opened = builder.obtain(blueprint)
        assert opened.fault(again=False) == "state has changed on the disk"
        with pytest.raises(LaunchError, match="the template of mine is damaged"):
            opened.check()

    def test_of_now(self, opened):
        assert opened.fault(again=False) == ""
        damage.KINDS["removed"](opened.template.folder / "state")
        assert opened.fault(again=False) == ""
        assert "state" in opened.fault(again=True)

    def test_another_run_has_made_it_anew(self, opened, builder, store, keep, said):
        """Its files are not those of the memory that is open here; they are left alone."""
        store.throw_away(opened.template.key, opened.template)
        with pytest.raises(LaunchError, match="another run has removed"):
            opened.check_current()
        keep("")
        with pytest.raises(LaunchError, match="another run has removed"):
            opened.check_current()
        fault = opened.fault(again=True)
        assert fault
        builder.drop(opened, fault)
        (template,) = store.all()
        assert template.damage() == ""
        assert said == []

    def test_is_told_by_who_throws_it_away(self, opened, builder, store, said):
        builder.drop(opened, "state has changed on the disk")
        assert store.all() == []
        assert said == [
            "the template of mine was damaged (state has changed on the disk), so it is built again"
        ]
