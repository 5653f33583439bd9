"""Definitions, their digests, and how images are found and selected."""

import os
import re
import shutil
from pathlib import Path

import pytest

from pytest_vmsandbox.catalogue import (
    catalogue as catalogue_module,
    definition as definition_module,
)
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import ConfigError
from support.definitions import toml

TOML = f"""\
schema = 1
description = "An image"
architecture = "{native_architecture()}"
recipe = "build"
uses = []
requires = ["sh", "mkfs.ext4"]
[boot]
append = "root=/dev/vda rw"
memory_min = "256MiB"
[disk]
size = "8GiB"
[system]
python = true
init = "systemd"
user = "root"
"""


def define(folder, toml=TOML):
    folder.mkdir(parents=True)
    (folder / "image.toml").write_text(toml)
    recipe = folder / "build"
    recipe.write_text("#!/bin/sh\n")
    recipe.chmod(0o755)
    return folder


@pytest.fixture
def folder(tmp_path):
    return define(tmp_path / "images" / "mine")


@pytest.fixture
def image_path(tmp_path, monkeypatch):
    """A folder for images of the user, and a catalogue whose own images are a, b and b-2."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own"
    for name in ("b-2", "b", "a"):
        define(own / name)
    monkeypatch.setattr(catalogue_module, "own_folders", lambda: [own])
    path = tmp_path / "images"
    path.mkdir()
    return path


class TestDefinition:
    def test_has_what_the_file_says(self, folder):
        definition = ImageDefinition.read(folder)
        assert definition == ImageDefinition(
            name="mine",
            folder=folder,
            description="An image",
            architecture=native_architecture(),
            recipe="build",
            uses=(),
            requires=("sh", "mkfs.ext4"),
            append="root=/dev/vda rw",
            memory_min=256 * 1024**2,
            disk_size=8 * 1024**3,
            python=True,
            init="systemd",
            user="root",
        )

    def test_needs_no_disk(self, folder):
        (folder / "image.toml").write_text(TOML.replace('[disk]\nsize = "8GiB"\n', ""))
        assert ImageDefinition.read(folder).disk_size is None

    @pytest.mark.parametrize("name", ["Mine", "-x", "a b", "a*", "all", "é", "!a", "a[b]"])
    def test_name_is_checked(self, tmp_path, name):
        with pytest.raises(ConfigError, match="is not a name for an image"):
            ImageDefinition.read(define(tmp_path / name))

    @pytest.mark.parametrize(
        "line",
        [
            line
            for line in TOML.splitlines()
            if re.match(r"schema|description|architecture|append|size|python|init", line)
        ],
    )
    def test_some_keys_are_needed(self, folder, line):
        (folder / "image.toml").write_text(TOML.replace(line + "\n", ""))
        with pytest.raises(ConfigError, match="missing key") as raised:
            ImageDefinition.read(folder)
        key = line.split(" = ")[0]
        assert f".{key}'" in str(raised.value) or f" '{key}'" in str(raised.value)
        assert str(folder / "image.toml") in raised.value.brief
        assert key in raised.value.remedy

    @pytest.mark.parametrize("table", ["boot", "system"])
    def test_every_table_is_needed(self, folder, table):
        (folder / "image.toml").write_text(TOML.replace(f"[{table}]", f"[{table}s]"))
        with pytest.raises(ConfigError, match=f"unknown key '{table}s'"):
            ImageDefinition.read(folder)

    @pytest.mark.parametrize(
        ("before", "key"),
        [
            ("", "extra"),
            ("[boot]\n", "boot.extra"),
            ("[disk]\n", "disk.extra"),
            ("[system]\n", "system.extra"),
        ],
    )
    def test_no_other_key_is_allowed(self, folder, before, key):
        toml = TOML.replace(before, f"{before}extra = 1\n", 1)
        (folder / "image.toml").write_text(toml)
        with pytest.raises(ConfigError, match=f"unknown key '{key}'") as raised:
            ImageDefinition.read(folder)
        assert "the keys here are: " in raised.value.remedy

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            ("schema", ["2", "true", "1.0", '"1"']),
            ("description", ['""', "1", r'"two\nlines"']),
            ("architecture", ['"arm64"', '""', "1", "[]"]),
            ("recipe", ['"gone"', '"image.toml"', '"../mine/build"', '"."', '""', "1"]),
            ("uses", ['"build"', "[1]", '["/etc/hostname"]', r'["a\u0000b"]']),
            ("requires", ['"sh"', '["/bin/sh"]', '[""]', '["-x"]', "[true]", '["a b"]']),
            ("append", ["1", r'"a\nb"', "[]"]),
            ("memory_min", ['"256"', "256", '"0MiB"', '"1MB"', '"-1MiB"']),
            ("size", ['"8G"', "8"]),
            ("python", ["1", '"true"']),
            ("init", ['"runit"', "1"]),
            ("user", ['""', '"a b"', "0", '"../x"']),
        ],
    )
    def test_wrong_values(self, folder, key, values):
        line = next(line for line in TOML.splitlines() if line.startswith(f"{key} = "))
        for value in values:
            (folder / "image.toml").write_text(TOML.replace(line, f"{key} = {value}"))
            with pytest.raises(ConfigError, match="is not allowed") as raised:
                ImageDefinition.read(folder)
            assert str(folder / "image.toml") in raised.value.brief
            assert f"{key} = " in raised.value.brief
            assert f"{key} must be " in raised.value.remedy

    def test_a_path_that_does_not_exist(self, folder):
        (folder / "image.toml").write_text(TOML.replace("uses = []", 'uses = ["build", "../gone"]'))
        with pytest.raises(ConfigError) as raised:
            ImageDefinition.read(folder)
        assert raised.value.brief == (
            f"{folder / 'image.toml'}: uses names '../gone', which does not exist"
        )

    @pytest.mark.parametrize("table", ["boot", "disk", "system"])
    def test_a_table_is_a_table(self, folder, table):
        at = TOML.index(f"[{table}]")
        rest = TOML[at:].partition("\n[")
        toml = f"{table} = 1\n" + TOML[:at] + rest[1].strip("\n") + rest[2]
        (folder / "image.toml").write_text(toml)
        with pytest.raises(ConfigError, match=f"{table} = 1 is not allowed"):
            ImageDefinition.read(folder)

    @pytest.mark.parametrize("content", [b"schema = ", b"\xff", b"a = 1\na = 2"])
    def test_not_toml(self, folder, content):
        (folder / "image.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"image\.toml cannot be read"):
            ImageDefinition.read(folder)

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"image\.toml cannot be read"):
            ImageDefinition.read(tmp_path / "gone")

    def test_recipe_that_is_not_executable(self, folder):
        (folder / "build").chmod(0o644)
        with pytest.raises(ConfigError, match="recipe = 'build' is not allowed"):
            ImageDefinition.read(folder)


class TestDigest:
    @pytest.fixture
    def folder(self, folder):
        (folder / "image.toml").write_text(TOML.replace("uses = []", 'uses = ["../lib", "../f"]'))
        (folder / "files").mkdir()
        (folder / "files" / "motd").write_text("hello")
        (folder.parent / "lib" / "deep").mkdir(parents=True)
        (folder.parent / "lib" / "deep" / "lib.sh").write_text("true")
        (folder.parent / "f").write_text("f")
        return folder

    def test_is_a_sha256(self, folder):
        digest = ImageDefinition.read(folder).digest
        assert len(digest) == 64
        assert int(digest, 16)

    @pytest.mark.parametrize(
        ("named", "differ"),
        [
            ("", False),
            ("build", True),
            ("../lib/deep/lib.sh", True),
        ],
    )
    def test_the_helper_counts_if_a_recipe_installs_it(self, folder, monkeypatch, named, differ):
        helper = folder.parent / "helper.c"
        monkeypatch.setattr(definition_module, "helper_file", lambda: helper)
        if named:
            with (folder / named).open("a") as recipe:
                recipe.write('cp "$VMSANDBOX_HELPER" .\n')
        digests = []
        for text in ("int one;", "int other;"):
            helper.write_text(text)
            digests.append(ImageDefinition.read(folder).digest)
        assert (digests[0] != digests[1]) == differ

    def test_the_helper_counts_once(self, folder, monkeypatch):
        """Our own images name it in `uses`."""
        helper = folder.parent / "f"
        monkeypatch.setattr(definition_module, "helper_file", lambda: None)
        (folder / "build").write_text("#!/bin/sh\n# VMSANDBOX_HELPER\n")
        without = ImageDefinition.read(folder).digest
        monkeypatch.setattr(definition_module, "helper_file", lambda: helper)
        assert ImageDefinition.read(folder).digest == without

    @pytest.mark.parametrize(
        "change",
        [
            lambda it: (it / "build").write_text("#!/bin/sh\ntrue\n"),
            lambda it: (it / "image.toml").write_text(TOML + "# a comment\n"),
            lambda it: (it / "files" / "motd").write_text("bye"),
            lambda it: (it / "files" / "motd").chmod(0o755),
            lambda it: (it / "files" / "motd").rename(it / "files" / "issue"),
            lambda it: (it / "files" / "motd").unlink(),
            lambda it: (it / "files" / "new").touch(),
            lambda it: (it.parent / "lib" / "deep" / "lib.sh").write_text("false"),
            lambda it: (it.parent / "f").chmod(0o755),
        ],
    )
    def test_changes_with_what_goes_in(self, folder, change):
        before = ImageDefinition.read(folder).digest
        change(folder)
        assert ImageDefinition.read(folder).digest != before

    @pytest.mark.parametrize(
        "change",
        [
            lambda it: (it / "build").touch(),
            lambda it: (it / "build").chmod(0o700),
            lambda it: (it / "files" / "motd").chmod(0o664),
            lambda it: (it / "__pycache__").mkdir() or (it / "__pycache__" / "x.pyc").touch(),
            lambda it: (it.parent / "other").touch(),
        ],
    )
    def test_does_not_change_with_what_does_not_matter(self, folder, change):
        before = ImageDefinition.read(folder).digest
        change(folder)
        assert ImageDefinition.read(folder).digest == before

    def test_is_the_same_elsewhere(self, folder, tmp_path):
        shutil.copytree(folder.parent, tmp_path / "copy")
        copy = ImageDefinition.read(tmp_path / "copy" / "mine")
        assert copy.digest == ImageDefinition.read(folder).digest

    def test_depends_on_the_name(self, folder):
        shutil.copytree(folder, folder.parent / "other")
        other = ImageDefinition.read(folder.parent / "other")
        assert other.digest != ImageDefinition.read(folder).digest

    def test_is_read_once_for_each_object(self, folder):
        definition = ImageDefinition.read(folder)
        digest = definition.digest
        (folder / "build").write_text("#!/bin/sh\nfalse\n")
        assert definition.digest == digest

    @pytest.mark.parametrize(
        "make",
        [
            lambda it: os.mkfifo(it / "odd"),
            lambda it: (it / "odd").symlink_to("nowhere"),
            lambda it: (it / "odd").symlink_to("/usr"),
        ],
        ids=["fifo", "dangling", "link to a folder"],
    )
    def test_refuses_what_is_no_file(self, folder, make):
        make(folder)
        with pytest.raises(ConfigError, match="odd belongs to the image mine, but"):
            _ = ImageDefinition.read(folder).digest


class TestCatalogue:
    def test_lists_own_images_then_the_others(self, image_path, tmp_path):
        define(image_path / "zz")
        define(image_path / "0")
        define(tmp_path / "more" / "c")
        assert Catalogue([image_path, tmp_path / "more"]).names() == [
            *("a", "b", "b-2"),
            *("0", "zz"),
            "c",
        ]

    def test_imported_images_come_after_our_own(self, image_path, tmp_path):
        define(image_path / "0")
        define(tmp_path / "cache" / "imported" / "zz")
        define(tmp_path / "other" / "imported" / "c")
        assert Catalogue([image_path]).names() == ["a", "b", "b-2", "zz", "0"]
        assert Catalogue([image_path], tmp_path / "other").names() == ["a", "b", "b-2", "c", "0"]

    def test_no_place_for_a_cache(self, image_path, monkeypatch):
        def cache_dir():
            raise ConfigError("HOME is not set", remedy="set it")

        monkeypatch.setattr(catalogue_module, "cache_dir", cache_dir)
        assert Catalogue([image_path]).names() == ["a", "b", "b-2"]

    def test_ignores_what_is_no_image(self, image_path):
        (image_path / "lib").mkdir()
        define(image_path / ".hidden")
        (image_path / "image.toml").touch()
        assert Catalogue([image_path]).names() == ["a", "b", "b-2"]

    def test_touches_nothing_before_it_is_asked(self, image_path):
        Catalogue([image_path / "gone"])

    def test_missing_folder(self, image_path):
        with pytest.raises(ConfigError, match="gone") as raised:
            Catalogue([image_path / "gone"]).names()
        assert "vm_image_path" in raised.value.remedy

    def test_same_name_twice(self, image_path):
        define(image_path / "b")
        with pytest.raises(ConfigError, match="two images are called 'b'") as raised:
            Catalogue([image_path]).names()
        assert str(image_path / "b") in raised.value.details

    def test_the_same_folder_twice_is_one(self, image_path):
        define(image_path / "c")
        assert Catalogue([image_path, image_path]).names() == ["a", "b", "b-2", "c"]

    def test_bad_name(self, image_path):
        define(image_path / "Big")
        with pytest.raises(ConfigError, match="'Big' is not a name"):
            Catalogue([image_path]).names()

    def test_get(self, image_path):
        catalogue = Catalogue([image_path])
        definition = catalogue.get("a")
        assert definition.name == "a"
        assert catalogue.get("a") is definition

    def test_a_broken_definition_hurts_only_who_asks_for_it(self, image_path):
        define(image_path / "broken", "schema = 2")
        catalogue = Catalogue([image_path])
        assert catalogue.get("a").name == "a"
        assert catalogue.select(["b*"]) == ["b", "b-2", "broken"]
        with pytest.raises(ConfigError, match="broken"):
            catalogue.get("broken")

    def test_unknown_name(self, image_path):
        with pytest.raises(ConfigError, match="there is no image 'b-3'") as raised:
            Catalogue([image_path]).get("b-3")
        assert raised.value.remedy.startswith("did you mean 'b-2'? The images are: a, b, b-2. ")

    def test_unknown_name_among_many(self, image_path):
        for number in range(50):
            define(image_path / f"image-{number:02}")
        with pytest.raises(ConfigError) as raised:
            Catalogue([image_path]).get("image-5")
        assert raised.value.remedy.startswith("did you mean 'image-")
        assert raised.value.remedy.partition(". ")[0].endswith(
            ", image-26 and 23 more (vmsandbox images list)"
        )

    def test_a_folder_that_may_not_be_read_is_an_image(self, image_path, monkeypatch):
        """So who asks for it is told why it cannot be used, and nobody else is."""
        define(image_path / "private")
        is_file = Path.is_file

        def refused(path):
            if path.parent.name in ("private", "lost+found"):
                raise PermissionError(13, "Permission denied", str(path))
            return is_file(path)

        monkeypatch.setattr(Path, "is_file", refused)
        (image_path / "lost+found").mkdir()
        catalogue = Catalogue([image_path])
        assert catalogue.names() == ["a", "b", "b-2", "private"]

    def test_finds_our_own_images_in_a_checkout(self):
        assert "tiny" in Catalogue().names()
        for name in Catalogue().names():
            assert Catalogue().get(name).digest


class TestDeriving:
    """Who derives from whom."""

    def derive(self, folder, base, **changes):
        values = {"schema": 1, "description": "More", "from": base, **changes}
        folder.mkdir(parents=True)
        (folder / "image.toml").write_text(toml(values))

    def test_over_several_images(self, image_path, tmp_path):
        self.derive(image_path / "one", "two", boot={"memory_min": "1GiB"})
        self.derive(tmp_path / "more" / "two", "three", disk={"size": "9GiB"})
        self.derive(tmp_path / "more" / "three", "a", system={"user": "me"})
        definition = Catalogue([image_path, tmp_path / "more"]).get("one")
        assert (definition.base, definition.parent.base, definition.parent.parent.base) == (
            *("two", "three", "a"),
        )
        assert definition.parent.parent.parent.recipe == "build"
        assert (definition.memory_min, definition.disk_size) == (1024**3, 9 * 1024**3)
        assert (definition.user, definition.append) == ("me", "root=/dev/vda rw")

    def test_a_base_is_one_object(self, image_path):
        """So its files are read once, however many images derive from it."""
        for name in ("one", "two"):
            self.derive(image_path / name, "a")
        catalogue = Catalogue([image_path])
        assert catalogue.get("one").parent is catalogue.get("two").parent is catalogue.get("a")

    @pytest.mark.parametrize("length", [1, 2, 3])
    def test_a_circle(self, image_path, length):
        names = ["one", "two", "three"][:length]
        for name, base in zip(names, [*names[1:], names[0]], strict=True):
            self.derive(image_path / name, base)
        self.derive(image_path / "outside", "one")
        for name in ("one", "outside"):
            with pytest.raises(ConfigError, match="closes a circle") as raised:
                Catalogue([image_path]).get(name)
            assert raised.value.details == " from ".join([*names, "one"])
            assert f"{image_path / names[-1] / 'image.toml'}: from = 'one'" in raised.value.brief
            assert raised.value.remedy

    @pytest.mark.parametrize("length", [20, 21, 2000])
    def test_a_long_chain(self, image_path, length):
        self.derive(image_path / "x-0", "a")
        for number in range(1, length):
            self.derive(image_path / f"x-{number}", f"x-{number - 1}")
        catalogue = Catalogue([image_path])
        if length == 20:
            assert catalogue.get("x-19").digest
            return
        with pytest.raises(ConfigError, match="a chain of more than 20 images") as raised:
            catalogue.get(f"x-{length - 1}")
        assert raised.value.remedy

    def test_no_such_base(self, image_path):
        self.derive(image_path / "one", "b-3")
        with pytest.raises(ConfigError) as raised:
            Catalogue([image_path]).get("one")
        assert raised.value.brief == (
            f"{image_path / 'one' / 'image.toml'}: from = 'b-3', but there is no image 'b-3'"
        )
        assert raised.value.remedy.startswith("did you mean 'b-2'? ")

    def test_a_base_that_is_wrong(self, image_path):
        define(image_path / "two", TOML.replace("systemd", "runit"))
        self.derive(image_path / "one", "two")
        catalogue = Catalogue([image_path])
        for _ in range(2):
            with pytest.raises(ConfigError, match="two/image.toml: system.init = 'runit'"):
                catalogue.get("one")
        assert catalogue.get("a").name == "a"

    def test_the_digest_changes_with_the_base(self, image_path):
        define(image_path / "base")
        self.derive(image_path / "two", "base")
        self.derive(image_path / "one", "two")
        before = Catalogue([image_path]).get("one").digest
        assert Catalogue([image_path]).get("one").digest == before
        (image_path / "base" / "build").write_text("#!/bin/sh\ntrue\n")
        assert Catalogue([image_path]).get("one").digest != before

    def test_valid_leaves_out_what_is_wrong_or_foreign(self, image_path):
        define(image_path / "wrong", "schema = 2")
        foreign = {"x86_64": "aarch64"}.get(native_architecture(), "x86_64")
        define(image_path / "foreign", TOML.replace(native_architecture(), foreign))
        assert [name for name, _ in Catalogue([image_path]).valid()] == ["a", "b", "b-2"]
        with_foreign = Catalogue([image_path]).valid(foreign=True)
        assert [name for name, _ in with_foreign] == ["a", "b", "b-2", "foreign"]


class TestSelect:
    @pytest.mark.parametrize(
        ("patterns", "selected"),
        [
            ([], []),
            (["a"], ["a"]),
            (["b-2", "a", "a"], ["a", "b-2"]),
            (["b*"], ["b", "b-2"]),
            (["?"], ["a", "b"]),
            (["[ab]"], ["a", "b"]),
            (["all"], ["a", "b", "b-2"]),
            (["*"], ["a", "b", "b-2"]),
            (["all", "!b*"], ["a"]),
            (["!b*"], ["a"]),
            (["!b*", "b"], ["a", "b"]),
            (["a", "!b"], ["a"]),
            (["a", "!a"], []),
            (["!all"], []),
            (["foreign"], ["foreign"]),
        ],
    )
    def test_patterns(self, image_path, patterns, selected):
        foreign = {"x86_64": "aarch64"}.get(native_architecture(), "x86_64")
        define(image_path / "foreign", TOML.replace(native_architecture(), foreign))
        assert Catalogue([image_path]).select(patterns) == selected

    @pytest.mark.parametrize("pattern", ["c", "c*", "!c", "A", "", "!", "!!a"])
    def test_a_typo_is_an_error(self, image_path, pattern):
        with pytest.raises(ConfigError, match="there is no image") as raised:
            Catalogue([image_path]).select(["a", pattern])
        assert "The images are: a, b, b-2" in raised.value.remedy
