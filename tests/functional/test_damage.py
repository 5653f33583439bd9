"""Files in the cache that were damaged: found, told once, and made anew; never a wrong guest."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from contextlib import ExitStack

import pytest

from pytest_vmsandbox import ImageError
from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.core.paths import cache_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.cloning.template_builder import TemplateBuilder
from pytest_vmsandbox.guests.factory import GuestFactory
from pytest_vmsandbox.guests.templates import TemplateStore
from support import damage

HARDWARE = {"memory": "160MiB", "disks": ["16MiB"]}
# What happens to each file. That every kind of harm is found in every file is shown without guests:
# in tests/unit, by test_templates.py and test_integrity.py for templates, and by test_builder.py for images.
TEMPLATE = {
    "memory": "zeroed",
    "state": "truncated",
    "console": "removed",
    "key": "flipped",
    "disk0.0.qcow2": "removed",
    "template.json": "zeroed",
    "in-use.lock": "removed",
}
IMAGE = {
    "vmlinuz": "flipped",
    "initrd.img": "zeroed",
    "host_key.pub": "truncated",
    "image.json": "removed",
}


class Run:
    """A factory of its own, and what it has told."""

    def __init__(self, cache, stack, clones="demand"):
        self.told: list[str] = []
        callbacks = Announcer(self.told.append)
        settings = Settings(cache=cache, clones=clones)
        self.factory: GuestFactory = stack.enter_context(GuestFactory.open(settings, callbacks))

    def about(self, word):
        return [line for line in self.told if word in line]

    def layer(self):
        """The image with a layer on top."""
        return self.factory.prepare("tiny", fill, depends_on=["1"])

    def use(self, image="tiny", hardware=HARDWARE):
        """A guest works; it is a clone."""
        with self.factory.boot(image, **hardware) as vm:
            assert vm.engine.origin in {"cloned", "armed"}
            assert vm.run(["hostname"]).stdout.strip() == vm.name
            vm.write_text("/root/file", "content")
            assert vm.read_text("/root/file") == "content"
            if "disks" in hardware:
                vm.shell("mkfs.ext4 -q /dev/vda && e2fsck -fn /dev/vda")
            if image != "tiny":
                assert vm.read_text("/opt/layer") == "layer" * 10_000
            return vm.engine.origin

    def use_armed(self):
        """Clones are armed of a template that was damaged before; that is told once."""
        self.factory.expect("tiny", self.factory.hardware("tiny", HARDWARE), 4)
        self.use()
        assert self.factory.await_armed(120)
        assert self.use() == "armed"
        assert len(self.about("damaged")) == 1
        assert self.about("one by one") == []


def fill(vm):
    vm.write_text("/opt/layer", "layer" * 10_000)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache with one template, for guests with a disk, of an image that has digests."""
    cache = tmp_path_factory.mktemp("built")
    user = cache_dir()
    subprocess.run(["cp", "-a", "--parents", "images/tiny", str(cache)], cwd=user, check=True)
    if (user / "accelerator").exists():
        (cache / "accelerator").symlink_to(user / "accelerator")
    (metadata,) = cache.glob("images/tiny/*/image.json")
    content = json.loads(metadata.read_text())
    content.pop("seal", None)
    digests = {
        name: integrity.file_digest(metadata.parent / name)
        for name in IMAGE
        if name != metadata.name
    }
    integrity.write_record(metadata, {**content, "schema": 2, "digests": digests})
    with ExitStack() as stack:
        Run(cache, stack).use()
    return cache


@pytest.fixture
def cache(built, tmp_path):
    """A copy of that cache, but for the image."""
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    for name in ("images", "accelerator"):
        if (built / name).exists():
            (folder / name).symlink_to(built / name)
    argv = ["cp", "-a", "--sparse=always", str(built / "templates"), str(folder)]
    subprocess.run(argv, check=True)
    return folder


@pytest.fixture
def run(cache):
    """Opens factories on that cache, each as a run of its own."""
    with ExitStack() as stack:
        yield lambda clones="demand": Run(cache, stack, clones)


@pytest.fixture
def copied(built, monkeypatch):
    """Copies the undamaged template where a guest would be booted to make it anew."""
    (good,) = TemplateStore(built).all()
    record = integrity.read_record(good.folder / "template.json")

    def build(_self, folder, _blueprint, steps, _below):
        assert not steps
        files = [good.folder / name for name in record["digests"]]
        subprocess.run(["cp", "-a", "--sparse=always", *files, folder], check=True)
        return {key: record[key] for key in ("image", "name", "layers", "disk", "facts", "helper")}

    monkeypatch.setattr(TemplateBuilder, "_build", build)


@pytest.mark.parametrize(("name", "harm"), TEMPLATE.items())
def test_a_template(request, run, cache, name, harm):
    """It is made anew in an empty folder, so that it takes a boot for one of them is enough."""
    if harm != "truncated":
        request.getfixturevalue("copied")
    (template,) = TemplateStore(cache).all()
    damage.KINDS[harm](template.folder / name)
    one = run()
    one.use()
    (line,) = one.about("damaged")
    assert "the template of tiny was damaged" in line
    assert name in line
    assert one.about("one by one") == []
    second = run()
    second.use()
    assert second.told == []


def test_a_template_without_any_memory(run, cache):
    """Its clones are loaded, and do not answer."""
    (template,) = TemplateStore(cache).all()
    with template.memory.open("r+b") as memory:
        size = memory.seek(0, 2)
        memory.truncate(0)
        memory.truncate(size)
    run("armed").use_armed()


@pytest.mark.parametrize("name", ["state", "disk0.0.qcow2"])
def test_fillers_find_it_first(run, cache, name):
    (template,) = TemplateStore(cache).all()
    damage.KINDS["truncated"](template.folder / name)
    run("armed").use_armed()


def test_in_the_middle_of_a_run(run, cache):
    one = run()
    one.use()
    (template,) = TemplateStore(cache).all()
    damage.KINDS["truncated"](template.folder / "state")
    one.use()
    one.use()
    assert len(one.about("damaged")) == 1


@pytest.mark.parametrize("name", ["state", "template.json", "in-use.lock"])
def test_a_template_below_another_one(run, cache, name):
    first = run()
    first.use(first.layer(), {})
    layered = [it for it in TemplateStore(cache).all() if it.layers == ()]
    folders = sorted((it.folder for it in layered), key=lambda it: (it / "state").stat().st_ctime)
    below, above = folders  # in the order in which they were made
    damage.KINDS["removed" if name == "in-use.lock" else "truncated"](below / name)
    shutil.rmtree(above)
    one = run()
    one.use(one.layer(), {})
    (line,) = one.about("damaged")
    assert "the template of tiny was damaged" in line
    assert name in line
    second = run()
    second.use(second.layer(), {})
    second.use("tiny", {})
    assert second.told == []


def test_two_runs_at_once(run, cache):
    (template,) = TemplateStore(cache).all()
    damage.KINDS["zeroed"](template.folder / "state")
    runs, done = [run("armed"), run("armed")], []

    def use(one):
        one.factory.expect("tiny", one.factory.hardware("tiny", HARDWARE), 3)
        done.extend(one.use() for _ in range(3))

    threads = [threading.Thread(target=use, args=(one,)) for one in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 6
    told = [line for one in runs for line in one.told]
    assert len([line for line in told if "damaged" in line]) == 1
    assert len([line for line in told if line.startswith("preparing")]) == 1
    assert not any("one by one" in line for line in told)


@pytest.mark.parametrize("clones", ["demand", "never"])
@pytest.mark.parametrize(("name", "harm"), IMAGE.items())
def test_an_image(run, cache, name, harm, clones):
    """It cannot be made anew by the way, with or without a template of it."""
    images = (cache / "images").readlink()
    (cache / "images").unlink()
    shutil.copytree(images, cache / "images")
    (file,) = cache.glob(f"images/tiny/*/{name}")
    damage.KINDS[harm](file)
    one = run(clones)
    for _ in range(2):
        with pytest.raises(ImageError, match=f"'tiny' is damaged: .*{name}") as caught:
            one.factory.boot("tiny", **HARDWARE).__enter__()
        assert caught.value.remedy == "vmsandbox images build tiny --force"
    assert one.about("one by one") == []
