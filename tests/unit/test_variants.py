"""One definition for several architectures: the names of its images, and what differs between them.

The machine of these tests has a made-up architecture, so they hold on every machine.
"""

import platform
from dataclasses import replace

import pytest

from pytest_vmsandbox.catalogue import catalogue as catalogue_module
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.core.errors import ConfigError
from support import images

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
BOTH = ["x86_64", "aarch64"]


def define(folder, architectures, *, append="quiet", more=""):
    """An image for these architectures; a single one is a text."""
    key = "architecture" if isinstance(architectures, str) else "architectures"
    text = images.toml(architecture="REPLACED").replace(
        'architecture = "REPLACED"', f"{key} = {architectures!r}".replace("'", '"')
    )
    text = text.replace('append = ""', f'append = "{append}"')
    images.define(folder, text + more)


def derive(folder, base, more=""):
    folder.mkdir(parents=True)
    text = f'schema = 1\ndescription = "x"\nfrom = "{base}"\n{more}'
    (folder / "image.toml").write_text(text)


@pytest.fixture
def machine(monkeypatch):
    """Fake the name of this machine's architecture."""

    def machine(name):
        monkeypatch.setattr(platform, "machine", lambda: MACHINES.get(name, name))

    machine("amd64")
    return machine


@pytest.fixture
def folder(tmp_path, monkeypatch, machine):
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalogue_module, "own_folders", list)
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def catalogue(folder):
    """A new catalogue of what is in the folder now."""

    def catalogue():
        return Catalogue([folder])

    return catalogue


@pytest.fixture
def several(folder):
    """deb-1 and deb-2 for several architectures, and two images that have one each."""
    define(folder / "deb-1", ["x86_64", "aarch64", "riscv64"])
    define(folder / "deb-2", BOTH)
    define(folder / "one", "x86_64")
    define(folder / "other", "aarch64")
    return folder


class TestNames:
    def test_the_short_name_is_this_machines(self, several, catalogue, machine):
        names = catalogue().names()
        assert names == [
            *("deb-1", "deb-1_arm64", "deb-1_riscv64", "deb-2", "deb-2_arm64", "one", "other"),
        ]
        assert catalogue().get("deb-1").architecture == "x86_64"
        machine("arm64")
        assert catalogue().names() == [
            *("deb-1", "deb-1_amd64", "deb-1_riscv64", "deb-2", "deb-2_amd64", "one", "other"),
        ]
        assert catalogue().get("deb-1").architecture == "aarch64"

    def test_a_definition(self, several, catalogue):
        native, foreign = map(catalogue().get, ("deb-1", "deb-1_riscv64"))
        assert (native.name, native.variant_of) == ("deb-1", "")
        assert (foreign.name, foreign.variant_of) == ("deb-1_riscv64", "deb-1")
        assert foreign.architecture == "riscv64"
        assert foreign.folder == native.folder == several / "deb-1"
        assert foreign.reread() == foreign
        assert replace(foreign, folder=foreign.folder).record() == foreign.record()
        assert type(foreign).from_record(foreign.record()) == foreign

    def test_the_longer_spelling(self, several, catalogue, machine):
        known = catalogue()
        assert known.get("deb-1_amd64") is known.get("deb-1")
        assert known.get("one_amd64") is known.get("one")
        assert known.get("other_arm64") is known.get("other")
        machine("arm64")
        known = catalogue()
        assert known.get("deb-1_arm64") is known.get("deb-1")
        assert known.get("deb-1_amd64").architecture == "x86_64"
        assert known.get("one_amd64") is known.get("one")

    def test_not_for_this_machine(self, folder, catalogue, machine):
        define(folder / "deb-1", BOTH)
        machine("s390x")
        assert catalogue().names() == ["deb-1_amd64", "deb-1_arm64"]
        with pytest.raises(ConfigError, match="there is no image 'deb-1'") as raised:
            catalogue().get("deb-1")
        assert raised.value.remedy.startswith(
            "'deb-1' is there only for amd64 and arm64, not for s390x. They are emulated here: "
            "deb-1_amd64, deb-1_arm64"
        )

    @pytest.mark.parametrize(
        ("typo", "guess"),
        [
            ("deb-1-arm64", "did you mean 'deb-1_arm64'?"),
            ("deb-1_aarch64", "did you mean 'deb-1_arm64'?"),
            ("deb-1_x86_64", "did you mean 'deb-1'?"),
            ("deb-1-x86_64", "did you mean 'deb-1'?"),
            ("deb-1_ARM64", "did you mean 'deb-1_arm64'?"),
            ("deb-1:riscv64", "did you mean 'deb-1_riscv64'?"),
            ("deb-1_arm65", "did you mean 'deb-1_arm64'?"),
            ("deb-1_arm", "did you mean 'deb-1_arm64'?"),
            ("*_aarch64", "did you mean '*_arm64'?"),
            ("deb-*-x86_64", "did you mean 'deb-*_amd64'?"),
            ("deb-*_arm65", "did you mean 'deb-*_arm64'?"),
            (
                "deb-2_riscv64",
                (
                    "'deb-2' is there only for amd64 and arm64, not for riscv64. For riscv64 there are: "
                    "deb-1_riscv64"
                ),
            ),
            (
                "deb-[2-9]-riscv64",
                (
                    "'deb-[2-9]' is there only for amd64 and arm64, not for riscv64. For riscv64 there are: "
                    "deb-1_riscv64"
                ),
            ),
            (
                "one_arm64",
                (
                    "'one' is there only for amd64, not for arm64. For arm64 there are: deb-1_arm64, "
                    "deb-2_arm64, other"
                ),
            ),
            ("deb-2_x", "'x' is no architecture. 'deb-2' is there for amd64 and arm64"),
            ("deb-1_loongarch64", "'loongarch64' is no architecture. 'deb-1' is there for amd64, "),
            ("deb-*_x", "'x' is no architecture. 'deb-*' is there for amd64, arm64 and riscv64"),
            (
                "something-else_arm64",
                "The images for arm64 are: deb-1_arm64, deb-2_arm64, other. If it is in a folder",
            ),
            (
                "dbe-2_arm64",
                "did you mean 'deb-2_arm64' or 'deb-1_arm64'? The images for arm64 are: deb-1_arm64, ",
            ),
            (
                "nothing",
                (
                    "The images are: deb-1, deb-2, one. For other architectures: vmsandbox images list "
                    "--all. If it is in a folder of yours, name that folder: vm_image_path (pytest), "
                ),
            ),
            ("none_*", "The images are: deb-1, deb-2, one. "),
            (
                "arm64",
                (
                    "this is an architecture, and its images are: deb-1_arm64, deb-2_arm64, other. "
                    "'*_arm64' selects all of them"
                ),
            ),
            (
                "X86_64",
                "this is an architecture, and its images are: deb-1, deb-2, one. '*_amd64' ",
            ),
            ("s390x", "this is an architecture, and no image is for it"),
        ],
    )
    def test_a_typo(self, several, catalogue, typo, guess):
        with pytest.raises(ConfigError) as raised:
            catalogue().select([typo])
        assert raised.value.brief == f"there is no image {typo!r}"
        assert raised.value.remedy.startswith(guess)

    def test_a_sign_of_their_own(self, several, catalogue):
        """Some names have the sign that stands before an architecture."""
        define(several / "one_image", "x86_64")
        with pytest.raises(ConfigError) as raised:
            catalogue().get("one_imag")
        assert raised.value.remedy.startswith("did you mean 'one_image'? The images are: ")

    @pytest.mark.parametrize("pattern", ["all", "!*_arm64"])
    def test_a_machine_that_nothing_is_for(self, several, catalogue, machine, pattern):
        machine("loongarch64")
        with pytest.raises(ConfigError, match="no image for loongarch64 fits 'all'") as raised:
            catalogue().select([pattern])
        assert raised.value.details.startswith("for other architectures: deb-1_amd64, deb-1_arm64")
        assert raised.value.remedy.endswith("to the glob: *_amd64")
        with pytest.raises(ConfigError) as raised:
            catalogue().get("nothing")
        assert raised.value.remedy.startswith(
            "none is for loongarch64. Those that are emulated here: deb-1_amd64, "
        )

    def test_one_name_twice(self, several, catalogue):
        define(several / "deb-1_arm64", "aarch64")
        with pytest.raises(ConfigError, match="two images are called 'deb-1_arm64'") as raised:
            catalogue().names()
        assert raised.value.details == f"{several / 'deb-1'}\n{several / 'deb-1_arm64'}"

    def test_the_digest_is_the_same_on_every_machine(self, several, catalogue, machine):
        names = ("deb-1", "deb-1_arm64", "deb-1_riscv64")
        here = {catalogue().get(name).digest: name for name in names}
        assert [*here.values()] == [*names]
        machine("arm64")
        assert here[catalogue().get("deb-1").digest] == "deb-1_arm64"
        assert here[catalogue().get("deb-1_amd64").digest] == "deb-1"


class TestSelection:
    @pytest.mark.parametrize(
        ("patterns", "selected"),
        [
            ("all", "deb-1 deb-2 one"),
            ("*", "deb-1 deb-2 one"),
            ("deb-*", "deb-1 deb-2"),
            ("deb-*_arm64", "deb-1_arm64 deb-2_arm64"),
            ("deb-*_amd64", "deb-1 deb-2"),
            ("*_arm64", "deb-1_arm64 deb-2_arm64 other"),
            ("deb-1_*", "deb-1 deb-1_arm64 deb-1_riscv64"),
            ("deb-1_arm64 deb-1", "deb-1 deb-1_arm64"),
            ("deb-1_amd64 deb-1", "deb-1"),
            ("other", "other"),
            ("*_* !deb-1*", "deb-2 deb-2_arm64 one other"),
            ("*_* !deb-*_arm64", "deb-1 deb-1_riscv64 deb-2 one other"),
            ("deb-* !deb-1_amd64", "deb-2"),
            ("!deb-1", "deb-2 one"),
        ],
    )
    def test_patterns(self, several, catalogue, patterns, selected):
        assert catalogue().select(patterns.split()) == selected.split()

    @pytest.mark.parametrize(
        ("patterns", "left"),
        [
            ("all", "deb-1 deb-1_arm64 deb-1_riscv64 deb-2 deb-2_arm64 one other"),
            ("deb-1", "deb-1"),
            ("deb-1_amd64", "deb-1"),
            ("deb-1_arm64", "deb-1_arm64"),
            ("deb-?", "deb-1 deb-1_arm64 deb-1_riscv64 deb-2 deb-2_arm64"),
            ("*-2", "deb-2 deb-2_arm64"),
            ("*_arm64", "deb-1_arm64 deb-2_arm64 other"),
            ("!deb-*", "one other"),
            ("!deb-1", "deb-1_arm64 deb-1_riscv64 deb-2 deb-2_arm64 one other"),
            ("deb-* !*_riscv64", "deb-1 deb-1_arm64 deb-2 deb-2_arm64"),
        ],
    )
    def test_a_filter_is_for_every_architecture(self, several, catalogue, patterns, left):
        known = catalogue()
        fitting = known.fitting(patterns.split())
        assert [name for name in known.names() if name in fitting] == left.split()

    def test_a_glob_for_other_machines_only(self, several, catalogue):
        with pytest.raises(ConfigError, match="no image for amd64 fits 'oth\\*'") as raised:
            catalogue().select(["oth*"])
        assert raised.value.details == "for other architectures: other"
        assert "oth*_arm64" in raised.value.remedy
        assert catalogue().select(["oth*_arm64"]) == ["other"]

    def test_a_wrong_definition_counts_as_native(self, several, catalogue):
        (several / "deb-2" / "image.toml").write_text('architectures = ["arm64"]')
        assert catalogue().select(["deb-*"]) == ["deb-1", "deb-2"]
        assert catalogue().select(["deb-1*"]) == ["deb-1"]
        with pytest.raises(ConfigError, match="deb-2/image.toml: missing key 'schema'"):
            catalogue().select(["all"])


class TestDefinition:
    def test_the_console_stands_for_the_architectures(self, folder, catalogue):
        define(folder / "deb-1", BOTH, append="console={console} quiet")
        assert catalogue().get("deb-1").append == "console=ttyS0 quiet"
        assert catalogue().get("deb-1_arm64").append == "console=ttyAMA0 quiet"

    def test_what_differs(self, folder, catalogue):
        more = '[architecture.aarch64]\nmemory_min = "1GiB"\nappend = "{console}"\n'
        define(folder / "deb-1", BOTH, more=more)
        native, foreign = map(catalogue().get, ("deb-1", "deb-1_arm64"))
        assert (native.memory_min, native.append) == (128 * 1024**2, "quiet")
        assert (foreign.memory_min, foreign.append) == (1024**3, "ttyAMA0")

    @pytest.mark.parametrize(
        ("architectures", "more", "brief"),
        [
            (BOTH, "[architecture.arm64]\n", "unknown key 'architecture.arm64'"),
            (BOTH, "[architecture.aarch64]\nsize = 1\n", "unknown key 'architecture.aarch64.size'"),
            (BOTH, "[architecture]\naarch64 = 1\n", "architecture.aarch64 = 1 is not allowed"),
            (BOTH, "[architecture.riscv64]\n", "unknown key 'architecture.riscv64'"),
        ],
    )
    def test_wrong_differences(self, folder, catalogue, architectures, more, brief):
        define(folder / "deb-1", architectures, more=more)
        for name in ("deb-1", "deb-1_arm64"):
            with pytest.raises(ConfigError) as raised:
                catalogue().get(name)
            assert raised.value.brief == f"{folder / 'deb-1' / 'image.toml'}: {brief}"
            assert raised.value.remedy

    def test_the_name_of_a_folder_ends_with_no_architecture(self, folder, catalogue):
        define(folder / "deb-1_s390x", BOTH)
        for name in ("deb-1_s390x", "deb-1_s390x_arm64"):
            with pytest.raises(ConfigError, match="the name of the folder ends with") as raised:
                catalogue().get(name)
            assert raised.value.remedy == "rename the folder, such as to 'deb-1'"

    def test_a_single_one_beside_the_list(self, folder, catalogue):
        define(folder / "deb-1", BOTH)
        file = folder / "deb-1" / "image.toml"
        file.write_text(f'architecture = "x86_64"\n{file.read_text()}')
        with pytest.raises(ConfigError, match="cannot be used together with architectures"):
            catalogue().get("deb-1")

    def test_differences_without_a_list(self, folder, catalogue):
        define(folder / "deb-1", BOTH, more="[architecture.aarch64]\n")
        file = folder / "deb-1" / "image.toml"
        file.write_text(file.read_text().replace("architectures = ", "# "))
        with pytest.raises(ConfigError, match="missing key 'architectures'"):
            catalogue().get("deb-1")

    def test_an_architecture_that_has_gone_from_the_list(self, several, catalogue):
        definition = catalogue().get("deb-2_arm64")
        define(several / "deb-2", ["x86_64"])
        with pytest.raises(ConfigError, match="aarch64 is not among its architectures"):
            definition.reread()


class TestDeriving:
    def test_follows_its_base(self, several, catalogue, machine):
        derive(several / "web", "deb-1")
        derive(several / "web-2", "web")
        known = catalogue()
        assert known.select(["web*_*"]) == [
            *("web", "web_arm64", "web_riscv64", "web-2", "web-2_arm64", "web-2_riscv64"),
        ]
        assert known.get("web_arm64").base == "deb-1_arm64"
        assert known.get("web_arm64").variant_of == "web"
        assert known.get("web-2_arm64").parent is known.get("web_arm64")
        assert known.get("web-2").parent is known.get("web")
        assert known.get("web-2_arm64").reread() == known.get("web-2_arm64")
        machine("arm64")
        assert catalogue().get("web").base == "deb-1"
        assert catalogue().get("web").architecture == "aarch64"
        assert catalogue().get("web_amd64").base == "deb-1_amd64"

    def test_has_what_it_says(self, several, catalogue, machine):
        derive(several / "some", "deb-1", 'architectures = ["aarch64", "riscv64"]\n')
        derive(several / "single", "deb-1", 'architecture = "aarch64"\n')
        derive(several / "of-variant", "deb-1_arm64")
        derive(several / "of-long", "deb-1_amd64")
        known = catalogue()
        found = [name for name in known.names() if name.startswith(("some", "single", "of"))]
        assert found == ["of-long", "of-variant", "single", "some_arm64", "some_riscv64"]
        assert known.get("single").base == "deb-1_arm64"
        assert known.get("single").architecture == "aarch64"
        assert known.get("of-variant").base == "deb-1_arm64"
        assert known.get("of-long").base == "deb-1"
        assert known.get("some_arm64").base == "deb-1_arm64"
        assert known.select(["of*", "single", "some_*"])
        native = known.native()
        assert "of-long" in native
        assert "of-variant" not in native
        machine("arm64")
        known = catalogue()
        assert known.get("single").base == "deb-1"
        assert known.get("of-variant").base == "deb-1"
        assert known.get("of-long").base == "deb-1_amd64"

    def test_its_base_lacks_the_architecture(self, several, catalogue):
        derive(several / "web", "deb-2", 'architectures = ["riscv64"]\n')
        with pytest.raises(ConfigError, match="its base deb-2 is for x86_64"):
            catalogue().get("web_riscv64")

    def test_differs_from_its_base(self, several, catalogue):
        derive(several / "web", "deb-2", '[architecture.aarch64]\nmemory_min = "2GiB"\n')
        assert catalogue().get("web").memory_min == 128 * 1024**2
        assert catalogue().get("web_arm64").memory_min == 2 * 1024**3

    def test_a_circle(self, folder, catalogue):
        derive(folder / "a", "b_arm64")
        derive(folder / "b", "a")
        for name in ("a", "b"):
            with pytest.raises(ConfigError, match="from = "):
                catalogue().get(name)
