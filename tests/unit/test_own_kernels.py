"""Kernels of users in guests: what is kept of them, what boots, and why one does not."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from pytest_vmsandbox.cache.store import KERNELS, Entry, Store
from pytest_vmsandbox.catalogue import kernels as sources
from pytest_vmsandbox.catalogue.store import BuiltImage
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import OWN_KERNEL, Hardware, parse_kernel
from pytest_vmsandbox.guests.callbacks import Announcer
from pytest_vmsandbox.guests.kernels import KernelStore, newc
from pytest_vmsandbox.guests.running import kernel_faults
from support.images import DEFINITION
from support.kernels import GOOD, installed, kernel, package, tree

DEP = {"kernel/fs/ext4/ext4.ko": "", "kernel/drivers/block/virtio_blk.ko": ""}


def entries(archive: bytes) -> dict[str, bytes]:
    """Read a cpio archive: path → content."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        start = at + 110 + fields[11]
        name = archive[at + 110 : start - 1].decode()
        start += -start % 4
        if name == "TRAILER!!!":
            return found
        found[name] = archive[start : start + fields[6]]
        at = start + fields[6]
        at += -at % 4


@pytest.fixture
def ran(monkeypatch):
    """Programs that were run. They do what the real ones would, as far as it matters."""
    ran = []

    def run(argv, what, environment=None):
        ran.append(argv[0])
        if argv[0] == "depmod":
            folder = Path(argv[2], "lib/modules", argv[3])
            modules = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.ko"))]
            (folder / "modules.dep").write_text("".join(f"{module}:\n" for module in modules))
            (folder / "modules.devname").write_text("# Nodes\nfuse fuse c10:229\n")
        if argv[0] == "mke2fs":
            assert environment
            Path(argv[-1]).write_bytes(
                b"".join(file.read_bytes() for file in sorted(Path(argv[-2]).rglob("*.ko")))
            )
        if argv[:2] == ["dpkg-deb", "--extract"]:
            shutil.copytree(Path(argv[2]).with_suffix(".content"), argv[3], dirs_exist_ok=True)
        return "linux-image-6.12.9"

    monkeypatch.setattr(sources, "run_program", run)
    return ran


@pytest.fixture
def built(tmp_path):
    """An image."""
    (folder := tmp_path / "image").mkdir()
    (folder / "initrd.img").write_bytes(b"the image's own!!!")
    return BuiltImage(definition=DEFINITION, digest="0" * 64, folder=folder)


@pytest.fixture
def said():
    """Lines about long waits."""
    return []


@pytest.fixture
def store(tmp_path, said):
    with ExitStack() as stack:
        yield KernelStore(tmp_path / "cache", Announcer(said.append), stack)


def test_a_kernel_with_modules(tmp_path, ran, built, store, said):
    installed(tmp_path / "it", modules=[*DEP, "kernel/drivers/net/dummy.ko"])
    own = store.get(tmp_path / "it", built)
    assert own.release == "6.12.9"
    assert own.image.read_bytes() == (tmp_path / "it/boot/vmlinuz-6.12.9").read_bytes()
    assert own.modules.read_bytes() == 3 * b"\x7fELF module"
    joined = own.initrd.read_bytes()
    assert joined.startswith(b"the image's own!!!\0\0")
    there = entries(joined[20:])
    assert there["modules"] == b"/boot-modules/virtio_blk.ko\n/boot-modules/ext4.ko\n"
    assert there["boot-modules/ext4.ko"] == b"\x7fELF module"
    assert there["nodes"] == b"fuse c 10 229\n"
    assert os.stat(own.initrd).st_mode & 0o444 == 0o444
    assert store.get(tmp_path / "it", built) is own
    assert ran == ["depmod", "mke2fs"]
    assert len(said) == 1


def test_a_kernel_without_modules(tmp_path, ran, built, store):
    own = store.get(kernel(tmp_path / "bzImage"), built)
    assert own.modules is None
    assert entries(own.initrd.read_bytes()[20:]) == {
        "boot-modules": b"",
        "modules": b"",
        "nodes": b"",
    }
    assert ran == []


def test_it_is_kept_and_known_by_its_content(tmp_path, ran, built, store):
    tree(tmp_path / "one", modules=["fs/ext4/ext4.ko"])
    first = store.get(tmp_path / "one", built)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert store.get(tmp_path / "two", built).digest == first.digest
    assert ran.count("depmod") == 1
    (tmp_path / "two/fs/ext4/ext4.ko").write_bytes(b"\x7fELF other")
    with ExitStack() as stack:  # another run
        store = KernelStore(tmp_path / "cache", Announcer(), stack)
        assert store.get(tmp_path / "two", built).digest != first.digest
        assert store.get(tmp_path / "one", built).digest == first.digest
    assert ran.count("depmod") == 2


def test_a_package_is_unpacked_once(tmp_path, ran, built, store):
    installed(tmp_path / "some.content", modules=["kernel/fs/ext4/ext4.ko"])
    package(tmp_path / "some.deb")
    assert store.get(tmp_path / "some.deb", built).release == "6.12.9"
    assert ran == ["dpkg-deb", "dpkg-deb", "depmod", "mke2fs"]
    with ExitStack() as stack:
        KernelStore(tmp_path / "cache", Announcer(), stack).get(tmp_path / "some.deb", built)
    assert ran[4:] == ["dpkg-deb"]  # its name


@pytest.mark.parametrize("name", ["kernel/secret.ko", "modules.builtin", "modules.order"])
def test_a_file_of_this_machine_does_not_reach_guests(tmp_path, ran, built, store, name):
    (secret := tmp_path / "secret").write_bytes(b"\x7fELF secret")
    (file := installed(tmp_path / "it") / "lib/modules/6.12.9" / name).unlink(missing_ok=True)
    file.symlink_to(secret)
    with pytest.raises(ConfigError, match="leads out of .*it, to .*secret"):
        store.get(tmp_path / "it", built)
    assert ran == []


def test_a_link_that_turns_while_it_is_prepared(tmp_path, ran, built, store, monkeypatch):
    at = installed(tmp_path / "it") / "lib/modules/6.12.9/kernel/fs/ext4"
    (secret := tmp_path / "secret").write_bytes(b"\x7fELF secret")
    listed = sources.module_files

    def turned(kernel):
        files = [*listed(kernel)]
        (at / "ext4.ko").unlink()
        (at / "ext4.ko").symlink_to(secret)
        yield from files

    monkeypatch.setattr(sources, "module_files", turned)
    with pytest.raises(ConfigError, match="leads out of .*it, to .*secret"):
        store.get(tmp_path / "it", built)


@pytest.mark.parametrize("lines", ["fuse fuse c10:229 more\n", "fuse\n"])
def test_odd_nodes_are_left_out(tmp_path, ran, built, store, monkeypatch, lines):
    run = sources.run_program

    def depmod(argv, *more):
        done = run(argv, *more)
        if argv[0] == "depmod":
            folder = Path(argv[2], "lib/modules", argv[3])
            (folder / "modules.devname").write_text(lines, encoding="utf-8")
        return done

    monkeypatch.setattr(sources, "run_program", depmod)
    own = store.get(installed(tmp_path / "it"), built)
    assert entries(own.initrd.read_bytes()[20:])["nodes"] == b""


@pytest.mark.parametrize(
    ("name", "brief"),
    [
        ("boot/vmlinuz-6.12.9", "some.deb has no kernel"),
        (
            "lib/modules/6.12.9/kernel/fs/ext4/ext4.ko",
            "some.deb/lib/.*/ext4.ko is no kernel module",
        ),
    ],
)
def test_a_package_that_cannot_be_used(tmp_path, ran, built, store, name, brief):
    file = installed(tmp_path / "some.content") / name
    package(tmp_path / "some.deb")
    if name.startswith("boot"):
        file.unlink()
    else:
        file.write_text("text")
    with pytest.raises(ConfigError, match=f"{tmp_path}/{brief}"):
        store.get(tmp_path / "some.deb", built)


def test_a_damaged_one_is_made_again(tmp_path, ran, built, store):
    file = kernel(tmp_path / "bzImage")
    own = store.get(file, built)
    own.image.write_bytes(b"changed")
    with ExitStack() as stack:
        again = KernelStore(tmp_path / "cache", Announcer(), stack).get(file, built)
        assert again.image.read_bytes() == file.read_bytes()
        # It is held: nobody removes it while it is in use.
        things = Store(tmp_path / "cache", KERNELS, Entry)
        assert things.discard(things.folders()).in_use == [again.image.parent]


@pytest.mark.parametrize("where", ["options", "modules"])
def test_it_lacks_what_guests_need(tmp_path, ran, built, store, where):
    if where == "options":
        path = kernel(
            tmp_path / "bzImage",
            config=GOOD.replace("=m", "=y").replace("VIRTIO_NET=y", "VIRTIO_NET=n"),
        )
    else:
        path = installed(tmp_path / "it", modules=[*DEP, "kernel/virtio_console.ko"])
        (path / "lib/modules/6.12.9/modules.builtin").write_text(
            "kernel/drivers/virtio/virtio_pci.ko\n"
        )
    with pytest.raises(
        ConfigError, match="cannot run guests: it was built without CONFIG_VIRTIO_NET=y"
    ):
        store.get(path, built)
    assert not list((tmp_path / "cache/kernels").glob(".*"))


def test_a_build_that_goes_on(tmp_path, ran, built, store, monkeypatch):
    path = tree(tmp_path / "it", modules=["fs/ext4/ext4.ko"])
    make = sources.run_program

    def built_meanwhile(argv, *more):
        (path / "fs/ext4/ext4.ko").write_bytes(b"\x7fELF newer")
        return make(argv, *more)

    monkeypatch.setattr(sources, "run_program", built_meanwhile)
    with pytest.raises(ConfigError, match="changed while it was prepared"):
        store.get(path, built)
    monkeypatch.setattr(sources, "run_program", make)
    assert store.get(path, built).modules.read_bytes() == b"\x7fELF newer"


def test_an_archive():
    archive = newc([("d", 0o40755, b""), ("d/f", 0o100644, b"12345")])
    assert entries(archive) == {"d": b"", "d/f": b"12345"}
    assert len(archive) % 512 == 0


# -- what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("console", "option"),
    [
        ("[ 1.0] VFS: Unable to mount root fs on unknown-block(0,0)\n", "CONFIG_BLK_DEV_INITRD=y"),
        ('VFS: Cannot open root device "xyz" or unknown-block(0,0)', "CONFIG_BLK_DEV_INITRD=y"),
        ("Failed to execute /init (error -8)\nKernel panic", "CONFIG_BINFMT_SCRIPT=y"),
        ("Kernel panic - not syncing: No working init found.", "CONFIG_BINFMT_ELF=y"),
        ("vmsandbox: init\nvmsandbox: there is no /dev/vda\n", "CONFIG_VIRTIO_BLK=y"),
        ("vmsandbox: init\nvmsandbox: cannot mount /dev/vda\n", "CONFIG_EXT4_FS=y"),
        ("Initramfs unpacking failed: junk", "CONFIG_RD_XZ=y"),
    ],
)
def test_what_the_console_says(console, option):
    found = kernel_faults.fault(console)
    assert option in found.remedy(has_modules=True)
    are_drivers = "/dev/vda" in console
    assert ("that has them" in found.remedy(has_modules=False)) is are_drivers


BIOS = "SeaBIOS (version 1.16.2)\nBooting from ROM...\nProbing EDD (edd=off to disable)... o"


def test_a_kernel_that_resets_the_machine():
    found = kernel_faults.fault(3 * BIOS)
    assert found.brief == "the kernel resets the machine again and again"
    assert "may be damaged" in found.remedy(has_modules=False)
    assert "CONFIG" not in found.remedy(has_modules=True)


@pytest.mark.parametrize(
    "console", ["", 2 * BIOS, "Linux version 6\nvmsandbox: init\nvmsandbox: ssh\n", "oops"]
)
def test_a_console_that_says_nothing_about_it(console):
    assert kernel_faults.fault(console) is None


# -- what users write -------------------------------------------------------------------------------------


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_kernel("a") == tmp_path / "a"
    assert parse_kernel(Path("a"), Path("/x")) == Path("/x/a")
    assert parse_kernel("~/a") == Path("/home/me/a")
    assert parse_kernel("~/a", Path("/x")) == Path("/home/me/a")
    assert parse_kernel("~no-such-user/a", Path("/x")) == Path("/x/~no-such-user/a")
    assert parse_kernel("/b", Path("/x")) == Path("/b")
    assert parse_kernel(OWN_KERNEL) is None
    default = Hardware(kernel=Path("/b"))
    assert default.changed({"kernel": None}).kernel == Path("/b")
    assert default.changed({"kernel": "image"}).kernel is None


def test_the_key_does_not_depend_on_time(tmp_path, ran, built, store):
    file = kernel(tmp_path / "bzImage")
    digest = store.get(file, built).digest
    os.utime(file, (1, 1))
    with ExitStack() as stack:
        again = KernelStore(tmp_path / "cache", Announcer(), stack).get(file, built)
        assert again.digest == digest
