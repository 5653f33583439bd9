"""What image.toml may say: each key, wrong in turn, and which keys go together."""

import hashlib
import os
import time
from dataclasses import fields, replace
from typing import Any

import pytest

from pytest_vmsandbox.cache import integrity
from pytest_vmsandbox.catalogue import definition as definition_module
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.catalogue.origin import ADOPTED, METHODS, Addition, Login
from pytest_vmsandbox.catalogue.store import files_of
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import GIB, MIB, Hardware
from support.definitions import (
    DERIVED,
    DISK,
    KERNEL,
    ORIGINS,
    RECIPE,
    Values,
    changed,
    read,
    toml,
    write,
)

TEXT = [1, True, "", "two\nlines", ["text"]]
SIZES = ["8", 8, "8GB", "0GiB", "-1GiB", "8 G", ["8GiB"]]
DIGESTS = ["", "a" * 63, "a" * 65, "g" * 64, "a" * 40, 1, ["a" * 64]]
PLACES = [
    *("", 1, "/etc/passwd", "file:///etc/passwd", "ftp://example.org/disk", "data:,x"),
    *(
        "https://",
        "https:///disk",
        "https://example.org",
        "https://example.org/a b",
        " disk",
        "a\nb",
    ),
]

SIGNED = changed(
    DISK, {"source.sha256": None, "source.checksums": "SUMS", "source.keyring": "image.toml"}
)

# For each key, a definition that may have it, and values that are wrong.
WRONG: dict[str, tuple[Values, list[Any]]] = {
    "schema": (RECIPE, [2, 0, True, 1.0, "1"]),
    "description": (RECIPE, TEXT),
    "architecture": (RECIPE, ["arm64", "", 1, ["x86_64"]]),
    "architectures": (
        changed(RECIPE, {"architecture": None}),
        ["x86_64", [], ["arm64"], ["x86_64", "x86_64"], [1], {"x86_64": 1}, [["x86_64"]]],
    ),
    "recipe": (RECIPE, ["gone", "image.toml", "../x/build", ".", "", "build/", 1]),
    "uses": (RECIPE, ["more", [1], ["/etc/hostname"], ["a\0b"]]),
    "requires": (RECIPE, ["sh", ["/bin/sh"], [""], ["-x"], [True], ["a b"]]),
    "from": (DERIVED, [1, "", ["recipe"], "two\nlines"]),
    "source": (DISK, ["https://example.org/disk.qcow2", [], 1]),
    "source.url": (DISK, PLACES),
    "source.sha256": (DISK, DIGESTS),
    "source.sha512": (changed(DISK, {"source.sha256": None}), [*DIGESTS, "a" * 127]),
    "source.checksums": (changed(DISK, {"source.sha256": None}), PLACES),
    "source.keyring": (SIGNED, ["gone", "", 1, "../x/keys", "/etc/passwd"]),
    "source.signature": (SIGNED, PLACES),
    "source.format": (DISK, ["qcow", "QCOW2", "", "img", 1]),
    "source.kernel": (KERNEL, PLACES),
    "source.kernel_sha256": (KERNEL, DIGESTS),
    "source.initrd": (KERNEL, PLACES),
    "source.initrd_sha256": (KERNEL, DIGESTS),
    "add": (DERIVED, ["nginx", ["nginx"], 1]),
    "add.packages": (DERIVED, ["nginx", [1], [""], ["-y"], ["a b"], ["a;b"], ["$(x)"], ["--x"]]),
    "add.script": (DERIVED, ["gone", "more", "../derived/setup.sh", "", 1, "/etc/passwd"]),
    "add.network": (DERIVED, ["bridge", "", 1, True, ["nat"]]),
    "boot": (RECIPE, ["quiet", [], 1]),
    "boot.firmware": (DISK, ["UEFI", "efi", "", 1, True]),
    "boot.secure_boot": (DISK, ["true", 1, "uefi"]),
    "boot.tpm": (DISK, ["2.0", 1, "true"]),
    "boot.append": (RECIPE, [1, "two\nlines", ["quiet"]]),
    "boot.memory_min": (RECIPE, SIZES),
    "disk": (RECIPE, ["8GiB", 8, []]),
    "disk.size": (RECIPE, SIZES),
    "system": (RECIPE, ["debian", [], 1]),
    "system.name": (RECIPE, TEXT),
    "system.version": (RECIPE, [13, 1.5, True, "", "1\n3"]),
    "system.python": (RECIPE, [1, "true", "3", "3.x", "", "three", 3.11, "3.11.2.1", "٣.٩"]),
    "system.init": (RECIPE, ["runit", "", 1, False]),
    "system.user": (RECIPE, ["", "a b", 0, "../x", "-x"]),
    "login": (DISK, ["password", [], 1]),
    "login.method": (DISK, ["ssh", "", 1, False]),
    "login.user": (DISK, ["", "a b", 0, "-x"]),
    "login.password": (DISK, ["", 1, "two\nlines", ["secret"]]),
    "login.ready": (KERNEL, ["", "(", 1, "a\nb", "a{99999999999999999999}"]),
}
KEYS = [
    *definition_module._KEYS,
    *(f"{table}.{key}" for table, keys in definition_module._TABLES.items() for key in keys),
]


def error_of(folder, values):
    """The error of a definition. It names the file, and has a remedy."""
    with pytest.raises(ConfigError) as raised:
        read(folder, values)
    error = raised.value
    assert error.brief.startswith(f"{folder / 'image.toml'}: ")
    assert "\n" not in error.brief
    assert error.remedy
    return error


@pytest.mark.parametrize("key", KEYS)
def test_each_key_with_wrong_values(tmp_path, key):
    values, wrong = WRONG[key]
    for number, value in enumerate(wrong):
        error = error_of(tmp_path / f"wrong-{number}", changed(values, {key: value}))
        assert f": {key} = " in error.brief
        assert error.brief.endswith(" is not allowed")
        assert error.remedy.startswith(f"{key} must be ")


@pytest.mark.parametrize("key", KEYS)
def test_each_key_misspelt(tmp_path, key):
    values, _ = WRONG[key]
    table, dot, name = key.rpartition(".")
    typo = f"{table}{dot}{name}x"
    error = error_of(tmp_path / "typo", changed(values, {typo: 1}))
    assert error.brief.endswith(f": unknown key {typo!r}")
    assert error.remedy.startswith(f"did you mean {name!r}? The keys here are: ")


@pytest.mark.parametrize(
    ("values", "typo", "hint"),
    [
        (DERIVED, "packages", "packages belongs into [add]. The keys here are: schema, "),
        (DISK, "boot.description", "description belongs to the top, before the first table. The"),
        (DISK, "disk.firmware", "firmware belongs into [boot]. The keys here are: size"),
        (RECIPE, "user", "user belongs into [system]. The"),
        (RECIPE, "disk.colour", "the keys here are: size"),
    ],
)
def test_a_key_in_a_wrong_place(tmp_path, values, typo, hint):
    error = error_of(tmp_path / "mine", changed(values, {typo: 1}))
    assert error.brief.endswith(f": unknown key {typo!r}")
    assert error.remedy.startswith(hint)


@pytest.mark.parametrize("origin", ORIGINS)
def test_each_origin(tmp_path, origin):
    definition = read(tmp_path / "mine", ORIGINS[origin])
    assert definition.origin == {"recipe": "recipe", "derived": "from"}.get(origin, "source")
    assert definition.reread() == definition


# What is missing, and what else it depends on.
MISSING = [
    *((RECIPE, {key: None}, key) for key in ("schema", "description", "architecture")),
    *((RECIPE, {f"{key}": None}, key) for key in ("boot.append", "system.python", "system.init")),
    *((DERIVED, {key: None}, key) for key in ("schema", "description")),
    *((DISK, {key: None}, key) for key in ("architecture", "source.format", "source.sha256")),
    *((DISK, {key: None}, key) for key in ("disk.size", "login.method", "login.password")),
    (DISK, {"disk": None}, "disk.size"),
    (DISK, {"boot": None}, "source.kernel"),
    (KERNEL, {"source": {}}, "source.url"),
    (KERNEL, {"source.kernel_sha256": None}, "source.kernel_sha256"),
    (KERNEL, {"source.initrd_sha256": None}, "source.initrd_sha256"),
    (KERNEL, {"login.ready": None}, "login.ready"),
    (RECIPE, {"boot": {"firmware": "bios"}}, "login.method"),
]


@pytest.mark.parametrize(("values", "changes", "key"), MISSING)
def test_missing(tmp_path, values, changes, key):
    error = error_of(tmp_path / "mine", changed(values, changes))
    assert f": missing key {key!r}" in error.brief


# Keys that do not go together, and what the error says of them.
TOGETHER = [
    (RECIPE, {"recipe": None}, "has none", "recipe"),
    (RECIPE, {"from": "disk"}, "has 'recipe' and 'from'", "recipe"),
    (RECIPE, {"source": DISK["source"]}, "has 'recipe' and 'source'", "recipe"),
    (DERIVED, {"source": DISK["source"]}, "has 'from' and 'source'", "recipe"),
    (DERIVED, {"uses": []}, "uses cannot be used without a recipe", "remove uses"),
    (DISK, {"requires": []}, "requires cannot be used without a recipe", "remove requires"),
    (RECIPE, {"add.packages": ["a"]}, "add cannot be used without a base", "'from'"),
    (DISK, {"add.packages": ["a"]}, "add cannot be used without a base", "'from'"),
    (DERIVED, {"login.method": "key"}, "login cannot be used with a base", "system.user"),
    (
        DISK,
        {"source.checksums": "SUMS"},
        "checksums cannot be used together with source.sha256",
        "",
    ),
    (DISK, {"source.sha512": "a" * 128}, "sha512 cannot be used together with source.sha256", ""),
    (KERNEL, {"source.sha256": "a" * 64}, "sha256 cannot be used without source.url", ""),
    (KERNEL, {"source.format": "raw"}, "format cannot be used without source.url", ""),
    (KERNEL, {"source.checksums": "S"}, "checksums cannot be used without source.url", ""),
    (DISK, {"source.keyring": "k"}, "keyring cannot be used without source.checksums", "list"),
    (DISK, {"source.signature": "s"}, "signature cannot be used without source.keyring", "keys"),
    (DISK, {"source.initrd": "i"}, "initrd cannot be used without source.kernel", ""),
    (DISK, {"source.kernel_sha256": "a" * 64}, "kernel_sha256 cannot be used without", ""),
    (KERNEL, {"boot": {"firmware": "uefi"}}, "source.kernel cannot be used with boot.firmware", ""),
    (DISK, {"boot.append": "quiet"}, "append cannot be used with boot.firmware = 'uefi'", "kernel"),
    (DISK, {"boot.firmware": "bios"}, "secure_boot cannot be used with boot.firmware = 'bios'", ""),
    (RECIPE, {"boot.secure_boot": True}, "secure_boot cannot be used with boot.firmware", "uefi"),
    (RECIPE, {"boot.tpm": True}, "tpm cannot be used with boot.firmware = 'kernel'", "bios"),
    (KERNEL, {"disk.size": "1GiB"}, "disk cannot be used without source.url", "source.url"),
    (DISK, {"login.method": "vagrant"}, "password cannot be used with the method 'vagrant'", ""),
    (DISK, {"login.ready": "x"}, "ready cannot be used with the method 'password'", '"none"'),
    (RECIPE, {"login.user": "x"}, "user cannot be used with the method 'key'", "login.method"),
    (KERNEL, {"login.user": "x"}, "user cannot be used with the method 'none'", "login.method"),
    (
        DISK,
        {"login": {"method": "key"}},
        "'key' cannot be used with boot.firmware = 'uefi'",
        "none",
    ),
    *(
        (KERNEL, {"login": {"method": method}}, f"{method!r} cannot be used without a disk", "key")
        for method in ADOPTED
    ),
    # With a base, in the folder beside: "recipe" boots directly from 8 GiB, "kernel" has no disk.
    (DERIVED, {"from": "kernel"}, "disk cannot be used with from = 'kernel'", "with a disk"),
    (
        DERIVED,
        {"disk.size": "7GiB"},
        "disk.size = 7GiB is smaller than the disk of its base",
        "8GiB",
    ),
    (DERIVED, {"architecture": "aarch64"}, "its base recipe is for x86_64", "architecture"),
    (DERIVED, {"boot.firmware": "uefi"}, "its base recipe boots by 'kernel'", "boot.firmware"),
    (DERIVED, {"from": "disk", "boot.append": "x"}, "append cannot be used with", ""),
]


@pytest.mark.parametrize(("values", "changes", "why", "remedy"), TOGETHER)
def test_what_does_not_go_together(tmp_path, values, changes, why, remedy):
    error = error_of(tmp_path / "mine", changed(values, changes))
    assert why in error.brief
    assert remedy in error.remedy


def test_what_a_short_recipe_leaves_out(tmp_path):
    needed = ("schema", "description", "architecture", "recipe")
    short = {key: RECIPE[key] for key in needed} | {
        "boot": {"append": ""},
        "system": {"python": True, "init": "systemd"},
    }
    definition = read(tmp_path / "mine", short)
    assert (definition.uses, definition.requires, definition.disk_size) == ((), (), None)
    assert (definition.memory_min, definition.user) == (256 * MIB, "root")
    assert (definition.firmware, definition.login) == ("kernel", Login())
    assert (definition.source, definition.add, definition.parent) == (None, None, None)


class TestDerived:
    def test_has_what_its_base_has(self, tmp_path):
        short = {key: DERIVED[key] for key in ("schema", "description", "from")}
        definition = read(tmp_path / "mine", short)
        base = definition.parent
        own = {
            "name",
            "folder",
            "description",
            "recipe",
            "uses",
            "requires",
            "base",
            "add",
            "parent",
        }
        for each in fields(ImageDefinition):
            if each.name not in own:
                assert getattr(definition, each.name) == getattr(base, each.name), each.name
        assert (definition.base, definition.add) == ("recipe", Addition())
        assert (definition.recipe, definition.source) == ("", None)

    def test_and_what_it_says_itself(self, tmp_path):
        more = {
            "boot": {"append": "quiet", "memory_min": "1GiB"},
            "system": {"name": "x", "version": "1", "python": "3.8", "init": "rc", "user": "you"},
        }
        definition = read(tmp_path / "mine", changed(DERIVED, more))
        assert definition.disk_size == 16 * GIB
        assert (definition.append, definition.memory_min) == ("quiet", GIB)
        assert (definition.system, definition.version) == ("x", "1")
        assert (definition.python, definition.python_version) == (True, "3.8")
        assert (definition.init, definition.user) == ("rc", "you")

    def test_of_an_imported_disk(self, tmp_path):
        values = changed(DERIVED, {"from": "disk", "boot.firmware": "bios", "boot.tpm": False})
        definition = read(tmp_path / "mine", values)
        assert (definition.firmware, definition.secure_boot, definition.tpm) == (
            *("bios", False, False),
        )
        assert definition.login == Login(method="password", user="admin", password="secret")
        assert definition.source is None
        assert definition.origin == "from"

    def test_of_an_image_without_a_disk(self, tmp_path):
        values = changed(DERIVED, {"from": "kernel", "disk": None})
        definition = read(tmp_path / "mine", values)
        assert (definition.disk_size, definition.has_initrd) == (None, True)
        assert definition.login == Login(method="none", ready="login: $")

    @pytest.mark.parametrize(
        ("add", "network"),
        [({}, "isolated"), ({"script": "setup.sh"}, "isolated"), ({"packages": ["a"]}, "nat")],
    )
    def test_network_only_for_packages(self, tmp_path, add, network):
        assert read(tmp_path / "mine", changed(DERIVED, {"add": add})).add.network == network

    def test_has_its_base_in_its_digest(self, tmp_path):
        definition = read(tmp_path / "mine", DERIVED)
        digest = definition.digest
        (definition.parent.folder / "more" / "file").touch()
        other = replace(definition, parent=definition.parent.reread())
        assert other.digest != digest

    def test_needs_a_catalogue(self, tmp_path):
        with pytest.raises(ConfigError, match="no other images are known"):
            ImageDefinition.read(write(tmp_path / "mine", toml(DERIVED)))


class TestInVm:
    @pytest.mark.parametrize(
        ("python", "in_vm"),
        [
            (True, True),
            (False, False),
            *((version, True) for version in ("3.9", "3.9.0", "3.10", "3.13.1", "4.0")),
            *((version, False) for version in ("3.8", "3.8.20", "2.7", "3.0")),
        ],
    )
    def test_needs_a_new_enough_python(self, tmp_path, python, in_vm):
        definition = read(tmp_path / "mine", changed(RECIPE, {"system.python": python}))
        assert definition.in_vm is in_vm
        assert definition.python is (python is not False)


class TestRecord:
    @pytest.mark.parametrize("origin", ORIGINS)
    def test_comes_back(self, tmp_path, origin):
        definition = read(tmp_path / "mine", ORIGINS[origin])
        again = ImageDefinition.from_record(in_a_file(tmp_path, definition.record()))
        assert again == definition
        assert again.parent is None

    def test_of_an_older_version(self, tmp_path):
        definition = read(
            tmp_path / "mine", changed(RECIPE, {"system.name": None, "system.version": None})
        )
        old = (
            *("name", "folder", "description", "architecture", "recipe", "uses", "requires"),
            *("append", "memory_min", "disk_size", "python", "init", "user"),
        )
        record = in_a_file(tmp_path, {key: definition.record()[key] for key in old})
        assert ImageDefinition.from_record(record) == definition


def in_a_file(folder, content):
    integrity.write_record(folder / "record.json", content)
    return integrity.read_record(folder / "record.json")


class TestFiles:
    def test_of_a_recipe(self, tmp_path):
        names = ["vmlinuz", "initrd.img", "host_key.pub", "disk.raw"]
        assert files_of(read(tmp_path / "mine", RECIPE)) == names
        assert files_of(read(tmp_path / "derived", DERIVED)) == names

    def test_of_a_disk(self, tmp_path):
        names = ["host_key.pub", "disk.raw", "key"]
        assert files_of(read(tmp_path / "mine", DISK)) == names
        assert files_of(read(tmp_path / "derived", changed(DERIVED, {"from": "disk"}))) == names

    def test_of_a_kernel(self, tmp_path):
        assert files_of(read(tmp_path / "mine", KERNEL)) == ["vmlinuz", "initrd.img"]
        alone = {"source.initrd": None, "source.initrd_sha256": None}
        assert files_of(read(tmp_path / "alone", changed(KERNEL, alone))) == ["vmlinuz"]

    @pytest.mark.parametrize("method", METHODS)
    def test_key_is_there_after_a_login(self, tmp_path, method):
        definition = replace(read(tmp_path / "mine", DISK), login=Login(method=method))
        assert ("key" in files_of(definition)) == (method in ADOPTED)
        assert ("host_key.pub" in files_of(definition)) == (method != "none")


class TestDigest:
    def test_disks_in_the_folder_count_by_their_digest(self, tmp_path):
        local = {"source.url": "files/disk.vmdk"}
        definition = read(tmp_path / "mine", changed(DISK, local))
        (definition.folder / "files").mkdir()
        (definition.folder / "files" / "disk.vmdk").symlink_to("/dev/zero")  # reading it never ends
        assert definition.reread().digest == definition.digest
        other = read(tmp_path / "x" / "mine", changed(DISK, {**local, "source.sha256": "d" * 64}))
        assert other.digest != definition.digest

    @pytest.mark.parametrize(
        ("values", "places"),
        [
            (DISK, {"source.url": "../elsewhere/disk.qcow2"}),
            (KERNEL, {"source.kernel": "../linux", "source.initrd": "https://example.org/i"}),
        ],
    )
    def test_the_place_of_a_file_does_not_count_if_its_digest_is_there(
        self, values, places, tmp_path
    ):
        """Two people who import the same files have the same image: one lock file fits both."""
        digest = read(tmp_path / "a" / "mine", values).digest
        assert read(tmp_path / "b" / "mine", changed(values, places)).digest == digest
        for key, value in (("description", "x"), ("boot.memory_min", "1GiB")):
            other = read(tmp_path / key / "mine", changed(values, {**places, key: value}))
            assert other.digest != digest
        for key in ("sha256", "kernel_sha256", "initrd_sha256"):
            if key in values["source"]:
                more = {**places, f"source.{key}": "e" * 64}
                assert read(tmp_path / key / "mine", changed(values, more)).digest != digest

    def test_a_place_without_a_digest_counts(self, tmp_path):
        sums = {"source.sha256": None, "source.checksums": "SUMS", "source.url": "disk"}
        digest = read(tmp_path / "a" / "mine", changed(DISK, sums)).digest
        other = read(tmp_path / "b" / "mine", changed(DISK, {**sums, "source.url": "disk2"}))
        assert other.digest != digest

    def test_a_disk_without_a_digest_is_read(self, tmp_path):
        sums = {"source.sha256": None, "source.url": "disk", "source.checksums": "SUMS"}
        definition = read(tmp_path / "mine", changed(DISK, sums))
        digest = definition.digest
        (definition.folder / "disk").touch()
        assert definition.reread().digest != digest

    def test_a_file_of_many_images_is_read_once(self, tmp_path, monkeypatch):
        reads = []
        digest = hashlib.file_digest

        def counted(stream, name):
            reads.append(stream.name)
            return digest(stream, name)

        monkeypatch.setattr(hashlib, "file_digest", counted)
        shared = tmp_path / "shared"
        shared.write_text("large")
        os.utime(shared, (1, 1))
        monkeypatch.setattr(definition_module, "wall", lambda: time.time() + 3600)
        for name in ("one", "two"):
            assert read(tmp_path / name, changed(RECIPE, {"uses": ["../shared"]})).digest
        assert reads.count(str(tmp_path / "one" / ".." / "shared")) == 1
        assert reads.count(str(tmp_path / "two" / ".." / "shared")) == 0

    def test_a_change_that_leaves_the_size_and_the_time_is_seen(self, tmp_path):
        """Two writes can have one time, so a file that has just been written is read again."""
        definition = read(tmp_path / "mine", RECIPE)
        file = definition.folder / "build"
        digests = set()
        for letter in "abcdefgh":
            file.write_text(f"#!/bin/sh\n# {letter}\n")
            digests.add(definition.reread().digest)
        assert len(digests) == 8


HOSTILE = {
    "large": (b"# " + b"x" * 70_000, "it is larger than 64KiB"),
    "an endless number": (b"schema = " + b"9" * 5_000, ""),
    "nested lists": (b"schema = " + b"[" * 30_000, "it is nested too deeply"),
    "nested tables": (b"schema = " + b"{a = " * 10_000, "it is nested too deeply"),
    # tomllib takes a minute for a key of 32,000 parts.
    "a key of many parts": (b"a" + b".a" * 1_001 + b" = 1", "more than 1000 dots"),
    "dots": (b"".join(b"b%d" % i + b".a" * 500 + b" = 1\n" for i in range(50)), "1000 dots"),
    "not UTF-8": (b"schema = 1\ndescription = '\xff'", "'utf-8' codec"),
    "UTF-16": ('schema = 1\ndescription = "x"\n'.encode("utf-16"), "'utf-8' codec"),
    "NUL": (b"schema = 1\0", ""),
    "a binary": (bytes(range(256)) * 16, ""),
    "empty": (b"", "missing key 'schema'"),
    "a key twice": (b"schema = 1\nschema = 1\n", ""),
    "a table twice": (b"schema = 1\n[boot]\n[boot]\n", ""),
}


class TestHostile:
    @pytest.mark.parametrize(("content", "why"), HOSTILE.values(), ids=HOSTILE)
    def test_content(self, tmp_path, content, why):
        folder = write(tmp_path / "mine", "")
        (folder / "image.toml").write_bytes(content)
        with pytest.raises(ConfigError) as raised:
            ImageDefinition.read(folder)
        assert str(folder / "image.toml") in raised.value.brief
        assert why in raised.value.brief
        assert len(raised.value.brief) < len(str(folder)) + 200
        assert raised.value.remedy

    @pytest.mark.parametrize(
        "value", ["0x" + "f" * 6_000, "inf", "1979-05-27T07:32:00Z", "'" + "x" * 10_000 + "'"]
    )
    def test_values(self, tmp_path, value):
        folder = write(tmp_path / "mine", f"schema = {value}\n")
        with pytest.raises(ConfigError, match="schema = .* is not allowed") as raised:
            ImageDefinition.read(folder)
        assert len(raised.value.brief) < len(str(folder)) + 200

    def test_a_byte_order_mark_is_allowed(self, tmp_path):
        folder = write(tmp_path / "mine", "\ufeff" + toml(RECIPE).replace("\n", "\r\n"))
        assert ImageDefinition.read(folder).description == "Made by a recipe"


class TestHardware:
    @pytest.mark.parametrize(
        ("values", "arguments", "why", "remedy"),
        [
            (RECIPE, {"memory": "255MiB"}, "255MiB of memory is too little", "at least 256MiB"),
            (RECIPE, {"disk": "7GiB"}, "a disk of 7GiB is smaller than that", "at least 8GiB"),
            (KERNEL, {"disk": "1GiB"}, "this image has no root disk", "leave disk= out"),
        ],
    )
    def test_that_an_image_cannot_have(self, tmp_path, values, arguments, why, remedy):
        definition = read(tmp_path / "mine", values)
        with pytest.raises(ConfigError, match=why) as raised:
            definition.check(Hardware().changed(arguments))
        assert remedy in raised.value.remedy

    def test_that_it_just_can_have(self, tmp_path):
        definition = read(tmp_path / "mine", RECIPE)
        definition.check(Hardware().changed({"memory": "256MiB", "disk": "8GiB"}))
