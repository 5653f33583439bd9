"""Kernels of users: finding them, what they can do, and their modules."""

import gzip
import lzma
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import kernel_files, kernels
from pytest_vmsandbox.catalogue.kernels import ModuleIndex
from pytest_vmsandbox.core.errors import ConfigError
from support.images import DEFINITION
from support.kernels import GOOD, bzimage, installed, kernel, package, tree

MODULE = "drivers/net/dummy.ko"


def test_a_file(tmp_path):
    file = kernel(tmp_path / "bzImage", "6.12.9-rc1+")
    found = kernels.find(file)
    assert (found.path, found.image, found.release) == (file, file, "6.12.9-rc1+")
    assert (found.modules, found.config) == (None, None)


def test_a_file_of_an_installed_kernel(tmp_path):
    installed(tmp_path)
    (tmp_path / "boot/config-6.12.9").write_text(GOOD)
    found = kernels.find(tmp_path / "boot/vmlinuz-6.12.9")
    assert found.modules == tmp_path / "lib/modules/6.12.9"
    assert found.config == tmp_path / "boot/config-6.12.9"
    assert replace(found, path=tmp_path) == kernels.find(tmp_path)
    assert [name for name, _ in kernels.module_files(found)] == [
        "kernel/fs/ext4/ext4.ko",
        "modules.order",
    ]


@pytest.mark.parametrize("order", [MODULE, f"kernel/{MODULE}", "drivers/net/dummy.o"])
def test_a_folder_in_which_one_was_built(tmp_path, order):
    tree(tmp_path, modules=[MODULE])
    (tmp_path / "modules.order").write_text(f"{order}\ndrivers/net/later.ko\n")
    for path in (tmp_path, tmp_path / "arch/x86/boot/bzImage"):
        found = kernels.find(path)
        assert (found.release, found.modules) == ("6.12.9", tmp_path)
        assert found.config == tmp_path / ".config"
        assert [*kernels.module_files(found)] == [
            (f"kernel/{MODULE}", tmp_path / MODULE),
            ("modules.order", tmp_path / "modules.order"),
        ]


def test_a_folder_with_installed_modules_only(tmp_path):
    built = tree(tmp_path / "built")
    at = tmp_path / "there/lib/modules/6.12.9"
    at.mkdir(parents=True)
    (at / "build").symlink_to(built)
    found = kernels.find(tmp_path / "there")
    assert found.image == at / "build/arch/x86/boot/bzImage"
    assert (found.modules, found.config) == (at, at / "build/.config")


def test_a_kernel_among_its_modules(tmp_path):
    file = kernel(tmp_path / "lib/modules/6.12.9/vmlinuz")
    assert kernels.find(file).modules == file.parent
    assert kernels.find(tmp_path).modules == file.parent


@pytest.mark.parametrize(
    "name",
    [
        "linux-image-6.1.0-9-cloud-amd64",
        "linux-image-unsigned-6.1.0-9-cloud-amd64",
        "linux-image-6.1.0-9-cloud-amd64-unsigned",
    ],
)
def test_a_package(tmp_path, monkeypatch, name):
    package(tmp_path / "some.deb")
    monkeypatch.setattr(kernels, "run_program", lambda *_: f"{name}\n")
    found = kernels.find(tmp_path / "some.deb")
    assert (found.release, found.image) == ("6.1.0-9-cloud-amd64", None)
    monkeypatch.setattr(
        kernels, "run_program", lambda argv, _: str(installed(Path(argv[3]), found.release))
    )
    unpacked = kernels.unpacked(found, tmp_path / "there")
    assert unpacked.image == tmp_path / "there/boot/vmlinuz-6.1.0-9-cloud-amd64"


def test_a_package_with_links_to_this_machine(tmp_path, monkeypatch):
    (secret := tmp_path / "secret").write_bytes(b"\x7fELF secret")
    package = kernels.Kernel(path=tmp_path / "some.deb", release="6.12.9", image=None)

    def unpack(argv, _):
        at = installed(Path(argv[3])) / "lib/modules/6.12.9"
        (at / "kernel/secret.ko").symlink_to(secret)
        (at / "kernel/same.ko").symlink_to("fs/ext4/ext4.ko")
        (at / "kernel/all").symlink_to(tmp_path)
        (at / "build").symlink_to("/usr/src/linux-headers")
        (at / "loop").symlink_to("loop")
        return ""

    monkeypatch.setattr(kernels, "run_program", unpack)
    found = kernels.unpacked(package, tmp_path / "there")
    names = [name for name, _ in kernels.module_files(found)]
    assert names == ["kernel/fs/ext4/ext4.ko", "kernel/same.ko", "modules.order"]


def two(folder):
    installed(folder)
    kernel(folder / "boot/vmlinuz-6.1.1", "6.1.1")


def other_modules(folder):
    installed(folder)
    kernel(folder / "boot/vmlinuz-6.12.9", "6.12.10")


def not_built(folder):
    (folder / "arch/x86").mkdir(parents=True)


def nothing(folder):
    (folder / "README").touch()


@pytest.mark.parametrize(
    ("make", "brief", "remedy"),
    [
        (two, "there are 2 kernels in", "name one of these files"),
        (other_modules, "is 6.12.10, but the modules there are for 6.12.9", "make modules_install"),
        (not_built, "no kernel was built in", "make -C"),
        (nothing, "has no kernel", "name a bzImage"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, brief, remedy):
    make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        kernels.find(tmp_path)
    assert brief in caught.value.brief
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "brief"),
    [
        (b"", "is empty"),
        (b"\x7fELF" + bytes(1000), "is an ELF file, such as vmlinux"),
        (bytes(0x38) + b"ARM\x64" + bytes(1000), "is a kernel for another architecture"),
        (b"MZ\0\0zimg" + bytes(1000), "is a kernel for another architecture"),
        (b"#!/bin/sh\n", "is no kernel for x86_64"),
        (bzimage()[:0x210], "is cut short: it has 528 bytes"),
        (bzimage()[:0x24F], "is cut short"),
        (bzimage()[:0x300], "is cut short: it has 768 bytes of at least 41"),
        (bzimage(config=GOOD)[:-32], "is cut short"),
        (bzimage("unknown"), "does not say its release"),
        (bzimage("6" * 65), "does not say its release"),
        (bzimage(protocol=0x20B), "is a kernel from before 2012"),
        (bzimage(bits64=False), "is a kernel for 32-bit machines"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, brief):
    (file := tmp_path / "kernel").write_bytes(content)
    with pytest.raises(ConfigError, match=brief) as caught:
        kernels.find(file)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "brief"),
    [
        (b"", "is cut short: it has 0 bytes"),
        (b"<html>Not found</html>", "is no Debian package"),
        (b"!<arch>\n" + bytes(200), "is no Debian package"),
        (b"!<arch>\n" + bytes(20), "is cut short: it has 28 bytes"),
    ],
)
def test_packages_that_cannot_be_used(tmp_path, content, brief):
    (file := tmp_path / "some.deb").write_bytes(content)
    with pytest.raises(ConfigError, match=brief) as caught:
        kernels.find(file)
    assert "fetch" in caught.value.remedy


@pytest.mark.parametrize("size", [100, 101])
def test_a_package_that_is_cut_short(tmp_path, size):
    content = package(tmp_path / "some.deb", size).read_bytes()
    kernel_files.check_package(tmp_path / "some.deb")
    (tmp_path / "some.deb").write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=f"is cut short: it has {len(content) - 1} bytes"):
        kernels.find(tmp_path / "some.deb")


@pytest.mark.parametrize("name", ["kernel", "kernel.deb"])
def test_a_fifo_does_not_hang(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="is not a regular file, but a FIFO"):
        kernels.find(tmp_path / name)


def test_fifos_in_a_folder_are_no_files(tmp_path):
    installed(tmp_path)
    for name in ("boot/vmlinuz-6.6.6", "boot/config-6.12.9", "lib/modules/6.12.9/a.ko"):
        os.mkfifo(tmp_path / name)
    found = kernels.find(tmp_path)
    assert (found.release, found.config) == ("6.12.9", None)
    assert "a.ko" not in [name for name, _ in kernels.module_files(found)]


def test_a_file_that_becomes_a_fifo(tmp_path):
    found = kernels.find(tree(tmp_path))
    (tmp_path / ".config").unlink()
    os.mkfifo(tmp_path / ".config")
    with pytest.raises(ConfigError, match=r"\.config cannot be read: .* a FIFO"):
        kernels.read_config(found)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file") as caught:
        kernels.find(tmp_path / "none")
    assert "check the path" in caught.value.remedy


def test_a_package_without_a_kernel(tmp_path, monkeypatch):
    package(tmp_path / "some.deb")
    monkeypatch.setattr(kernels, "run_program", lambda *_: "linux-headers-6.1\n")
    with pytest.raises(ConfigError, match="is the package linux-headers-6.1, which has no kernel"):
        kernels.find(tmp_path / "some.deb")


def test_a_program_that_is_missing_or_fails():
    with pytest.raises(ConfigError, match="no-such-program, which is needed to do it") as caught:
        kernels.run_program(["no-such-program"], "do it")
    assert "install it" in caught.value.remedy
    with pytest.raises(ConfigError, match="sh could not do it") as caught:
        kernels.run_program(["sh", "-c", "echo $WHY >&2; false"], "do it", {"WHY": "because"})
    assert "because" in caught.value.details
    assert "may be damaged" in caught.value.remedy
    assert kernels.run_program(["echo", "done"], "do it") == "done\n"


# -- the configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", ["gzip", "xz", "none"])
def test_the_configuration_in_a_kernel(tmp_path, pack):
    found = kernels.find(kernel(tmp_path / "bzImage", config=GOOD, pack=pack))
    config = kernels.read_config(found)
    assert config == (
        {}
        if pack == "none"
        else dict(line.removeprefix("CONFIG_").split("=") for line in GOOD.split())
    )
    assert kernels.missing_options(config, has_modules=True, has_disk=True, init="systemd") == []


@pytest.mark.parametrize(
    ("option", "value", "has_disk", "init", "is_missing"),
    [
        ("VIRTIO_BLK", "n", True, "systemd", True),
        ("VIRTIO_BLK", "n", False, "busybox", False),
        ("VIRTIO_BLK", "m", True, "systemd", False),
        ("DEVTMPFS", "m", False, "busybox", True),
        ("CGROUPS", "n", True, "systemd", True),
        ("CGROUPS", "n", False, "busybox", False),
        ("SERIAL_8250_CONSOLE", "n", False, "busybox", True),
    ],
)
def test_missing_options(tmp_path, option, value, has_disk, init, is_missing):
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"CONFIG_{option}=")]
    text = "\n".join(
        [*lines, f"CONFIG_{option}={value}" if value != "n" else f"# CONFIG_{option} is not set"]
    )
    found = kernels.find(tree(tmp_path, config=text))
    options = kernels.options_that_matter(kernels.read_config(found))
    missing = kernels.missing_options(options, has_modules=True, has_disk=has_disk, init=init)
    assert missing == ([f"CONFIG_{option}=y"] if is_missing else [])
    if is_missing:
        with pytest.raises(ConfigError, match=f"6.12.9 .* without CONFIG_{option}=y"):
            kernels.check_options(
                "6.12.9", tmp_path, options, has_modules=True, has_disk=has_disk, init=init
            )


def test_drivers_that_are_modules_need_the_modules(tmp_path):
    config = kernels.read_config(kernels.find(tree(tmp_path)))
    missing = kernels.missing_options(config, has_modules=False, has_disk=True, init="systemd")
    assert missing == ["CONFIG_VIRTIO_PCI=y", "CONFIG_EXT4_FS=y"]


def test_an_unknown_configuration_is_not_wrong(tmp_path):
    config = kernels.read_config(kernels.find(kernel(tmp_path / "bzImage")))
    assert kernels.options_that_matter(config) == {}
    assert kernels.missing_options({}, has_modules=False, has_disk=True, init="systemd") == []


@pytest.mark.parametrize("change", [{"firmware": "uefi"}, {"has_initrd": False}])
def test_images_that_boot_otherwise(change):
    kernels.check_image(DEFINITION)
    derived = replace(DEFINITION, parent=DEFINITION, base="some_image")
    kernels.check_image(derived)
    kernels.check_image(replace(DEFINITION, architecture="i686"))  # it can boot a kernel of 64 bits
    with pytest.raises(ConfigError, match="kernel= cannot be used with some_image"):
        kernels.check_image(replace(DEFINITION, **change))


def test_guests_of_another_architecture_boot_no_kernel_for_this_one():
    with pytest.raises(
        ConfigError, match="only kernels for amd64 are known here, and its guests are arm64"
    ):
        kernels.check_image(replace(DEFINITION, architecture="aarch64"))


# -- modules --------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path):
    files = {
        "modules.dep": "kernel/fs/ext4/ext4.ko: kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko\n"
        "kernel/fs/jbd2/jbd2.ko:\nkernel/fs/mbcache.ko:\nkernel/crypto/crc32c_generic.ko:\n"
        "kernel/a-b.ko:\nkernel/c.ko: kernel/a-b.ko\n",
        "modules.alias": "# Aliases\nalias crc32c crc32c_generic\nalias pci:v1* c\n",
        "modules.softdep": "softdep jbd2 pre: crc32c post: c\nsoftdep a_b pre: c\n",
        "modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/net/virtio_net.ko\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return ModuleIndex.read(tmp_path)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["virtio_pci", "unknown"], []),
        (["ext4"], ["crypto/crc32c_generic", "fs/jbd2/jbd2", "fs/mbcache", "fs/ext4/ext4"]),
        (["a_b"], ["c", "a-b"]),  # they depend on each other
        (["c", "c", "a-b"], ["a-b", "c"]),
    ],
)
def test_the_order_in_which_modules_are_loaded(index, names, order):
    assert index.to_load(names) == [f"kernel/{name}.ko" for name in order]


def test_drivers_that_are_nowhere(index):
    assert index.missing_options() == ["CONFIG_VIRTIO_CONSOLE=y", "CONFIG_VIRTIO_BLK=y"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_the_content_of_a_module(tmp_path, pack):
    (file := tmp_path / "a.ko").write_bytes(pack(b"\x7fELF module"))
    assert kernel_files.plain_module(file) == b"\x7fELF module"


@pytest.mark.parametrize("content", [b"", b"TOP SECRET", gzip.compress(b"TOP SECRET", mtime=0)])
def test_what_is_no_module(tmp_path, content):
    (file := tmp_path / "a.ko").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.ko is no kernel module") as caught:
        kernel_files.plain_module(file)
    assert "remove that file" in caught.value.remedy


@pytest.mark.parametrize("name", ["a b.ko", "a\nb.ko", "\udcff.ko.xz"])
def test_names_of_modules_that_are_no_words(tmp_path, name):
    installed(tmp_path)
    (tmp_path / "lib/modules/6.12.9" / name).touch()
    with pytest.raises(ConfigError, match="a name that cannot be used") as caught:
        list(kernels.module_files(kernels.find(tmp_path)))
    caught.value.brief.encode()


@pytest.mark.parametrize(
    "name",
    ["../outside.ko", "/outside.ko", "kernel/../../outside.o", "../../etc/shadow", "outside"],
)
def test_a_list_of_modules_that_leads_elsewhere(tmp_path, name):
    built = tree(tmp_path / "built", modules=[MODULE])
    (tmp_path / "outside.ko").write_bytes(b"\x7fELF module")
    (built / "modules.order").write_text(f"{name}\n")
    with pytest.raises(ConfigError, match="a name that cannot be used"):
        list(kernels.module_files(kernels.find(built)))


def test_files_that_are_named_like_modules(tmp_path):
    installed(tmp_path)
    at = tmp_path / "lib/modules/6.12.9"
    for name in ("a.ko.debug", "a.korn", ".a.ko.cmd"):
        (at / name).write_text("text")
    names = [name for name, _ in kernels.module_files(kernels.find(tmp_path))]
    assert names == ["kernel/fs/ext4/ext4.ko", "modules.order"]


# -- links ----------------------------------------------------------------------------------------------


def test_modules_elsewhere(tmp_path):
    folder, elsewhere = installed(tmp_path / "folder"), installed(tmp_path / "elsewhere")
    shutil.rmtree(folder / "lib")
    (folder / "lib").symlink_to(elsewhere / "lib")
    with pytest.raises(ConfigError, match="leads out of .*folder, to .*elsewhere") as caught:
        list(kernels.module_files(kernels.find(folder)))
    assert "put a copy there" in caught.value.remedy


def test_a_kernel_and_a_configuration_elsewhere(tmp_path):
    built = tree(tmp_path / "built")
    for name in ("arch/x86/boot/bzImage", ".config"):
        (built / name).rename(elsewhere := tmp_path / Path(name).name)
        (built / name).symlink_to(elsewhere)
    found = kernels.find(built)
    assert found.release == "6.12.9"
    assert kernels.read_config(found)["VIRTIO_PCI"] == "m"


def test_links_within_the_folder(tmp_path):
    installed(tmp_path / "usr")
    (tmp_path / "usr/boot").rename(tmp_path / "boot")
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "vmlinuz").symlink_to("boot/vmlinuz-6.12.9")
    at = tmp_path / "usr/lib/modules/6.12.9"
    (at / "vmlinuz").symlink_to("../../../../boot/vmlinuz-6.12.9")
    (at / "weak-updates").mkdir()
    other = tmp_path / "usr/lib/modules/6.12.8/extra/a.ko"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"\x7fELF other")
    (at / "weak-updates/a.ko").symlink_to("../../6.12.8/extra/a.ko")
    (at / "build").symlink_to("/usr/src/linux-6.12.9")
    (tmp_path / "named").symlink_to(tmp_path / "boot/vmlinuz-6.12.9")
    for path in (tmp_path, tmp_path / "named", tmp_path / "boot/vmlinuz-6.12.9"):
        found = kernels.find(path)
        files = dict(kernels.module_files(found))
        assert set(files) == {"kernel/fs/ext4/ext4.ko", "weak-updates/a.ko", "modules.order"}
        read = kernel_files.plain_module(files["weak-updates/a.ko"], found.home)
        assert read == b"\x7fELF other"


def test_modules_of_other_releases_beside_a_kernel_among_its_modules(tmp_path):
    file = kernel(tmp_path / "modules/6.12.9/vmlinuz")
    assert kernels.find(file).home == tmp_path / "modules"
    file = kernel(tmp_path / "6.12.9/vmlinuz")
    assert kernels.find(file).home == tmp_path / "6.12.9"


def test_a_damaged_module(tmp_path):
    (file := tmp_path / "a.ko.xz").write_bytes(lzma.compress(b"\x7fELF module")[:-20] + bytes(20))
    with pytest.raises(ConfigError, match="a.ko.xz is damaged"):
        kernel_files.plain_module(file)
