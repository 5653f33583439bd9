"""Without QEMU, without images, without any use: what the plugin does then."""

import os
import sys

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.core.paths import cache_dir

HEAVY = ("paramiko", "asyncio", "qemu", "click", "rich", "cryptography", "tomllib")
OURS = ("pytest_vmsandbox.guests", "pytest_vmsandbox.machine", "pytest_vmsandbox.catalogue")
LISTS_MODULES = """
    import sys

    def pytest_unconfigure(config):
        config.rootpath.joinpath("modules").write_text("\\n".join(sys.modules))
"""
USES = "def test_x(vm): pass"


@pytest.fixture
def no_qemu(bare, monkeypatch):
    monkeypatch.setenv("PATH", str(bare.path / "empty"))
    return bare


@pytest.fixture
def some_qemu(bare, monkeypatch):
    """A program that says that it is QEMU; no more is asked of it."""
    program = bare.path / "qemu-system-fake"
    program.write_text(f"#!{sys.executable} -IS\nprint('QEMU emulator version 9.9.9')\n")
    program.chmod(0o755)
    monkeypatch.setenv("VMSANDBOX_QEMU", str(program))
    return bare


def modules_of(suite, *args):
    suite.pytester.makeconftest(LISTS_MODULES)
    suite.write("def test_x(tmp_path): pass")
    suite.run_apart("-p", "no:hypothesispytest", *args).assert_outcomes(passed=1)
    return set((suite.path / "modules").read_text().splitlines())


class TestInert:
    def test_a_suite_without_guests_imports_nothing_for_them(self, bare):
        without = modules_of(bare, "-p", "no:vmsandbox", "-o", "addopts=")
        new = modules_of(bare) - without
        assert "pytest_vmsandbox.plugin" in new
        assert [name for name in new if name.split(".")[0] in HEAVY] == []
        assert [name for name in new if name.startswith(OURS)] == []

    def test_it_loads_where_the_modules_of_unix_are_missing(self, bare, monkeypatch):
        """As on Windows, where no guest can run."""
        modules = ("fcntl", "grp", "pwd", "resource", "termios")
        (bare.path / "elsewhere.py").write_text(
            f"import sys\n\nsys.modules.update(dict.fromkeys({modules}))\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(bare.path), prepend=os.pathsep)
        bare.write("import pytest\n\n@pytest.mark.vm('alpha-*')\ndef test_x(): pass")
        result = bare.run_apart("-p", "elsewhere", "-p", "no:hypothesispytest")
        result.assert_outcomes(passed=1)
        assert "vmsandbox:" not in result.stdout.str()

    def test_it_leaves_no_files(self, bare):
        bare.write("def test_x(): pass")
        bare.run_apart().assert_outcomes(passed=1)
        assert not (bare.path / "cache").exists()
        assert not (bare.path / "runtime").exists()

    def test_it_loads_without_qemu(self, no_qemu):
        no_qemu.write("def test_x(): pass")
        result = no_qemu.run_apart()
        result.assert_outcomes(passed=1)
        assert "vmsandbox:" not in result.stdout.str()

    def test_markers_are_known(self, suite):
        suite.write(f"import pytest\n@pytest.mark.vm(cpus=2)\n{USES}")
        suite.run("--strict-markers").assert_outcomes(passed=1)
        assert "@pytest.mark.vm(*images," in suite.run("--markers").stdout.str()

    def test_it_can_be_left_out(self, bare):
        bare.ini("[pytest]\n")
        bare.write(f"def test_plain(): pass\n{USES}")
        result = bare.run_apart("-p", "no:vmsandbox")
        result.assert_outcomes(passed=1, errors=1)
        assert "fixture 'vm' not found" in result.stdout.str()

    def test_the_help_has_every_option_and_key(self, bare):
        text = bare.run("--help").stdout.str()
        for word in ("--vm=NAME", "--vm-list", "--vm-accel", "--vm-missing", "vm_command_timeout"):
            assert word in text


INSIDE = "import pytest\n\n@pytest.mark.in_vm\ndef test_x(): pass"
ONLY_THERE = "import nothing_of_that_name"


@pytest.fixture
def inside(bare):
    """The image has a Python, so tests could run inside it."""
    definition = bare.path / "images" / "alpha-1" / "image.toml"
    definition.write_text(definition.read_text().replace("python = false", "python = true"))


class TestNoQemu:
    def test_is_an_error_with_a_remedy(self, no_qemu):
        no_qemu.write(USES)
        result = no_qemu.run_apart()
        result.assert_outcomes(errors=1)
        assert result.ret == pytest.ExitCode.TESTS_FAILED
        text = result.stdout.str()
        assert "there is no qemu-system-" in text
        assert "vmsandbox quickstart" in text

    @pytest.mark.parametrize("how", ["option", "ini"])
    def test_skips_where_that_is_asked_for(self, no_qemu, how):
        no_qemu.write(USES)
        if how == "ini":
            with (no_qemu.path / "pytest.ini").open("a") as file:
                print("vm_missing = skip", file=file)
        result = no_qemu.run_apart("-rs", *(["--vm-missing=skip"] if how == "option" else []))
        result.assert_outcomes(skipped=1)
        assert result.ret == pytest.ExitCode.OK
        result.stdout.fnmatch_lines(["SKIPPED*there is no qemu-system-*"])

    @pytest.mark.usefixtures("inside")
    @pytest.mark.parametrize(
        ("source", "args"),
        [(INSIDE, ()), (ONLY_THERE, ("--in-vm",))],
        ids=["marked", "not importable here"],
    )
    def test_and_tests_inside_guests(self, no_qemu, source, args):
        no_qemu.write(source)
        text = "there is no qemu-system-"
        result = no_qemu.run_apart(*args)
        result.assert_outcomes(errors=1)
        assert text in result.stdout.str()
        result = no_qemu.run_apart("-rs", "--vm-missing=skip", *args)
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines([f"SKIPPED*{text}*"])


class TestNoImage:
    def test_is_an_error_with_a_remedy(self, some_qemu):
        some_qemu.write(USES)
        result = some_qemu.run_apart()
        result.assert_outcomes(errors=1)
        text = result.stdout.str()
        assert "the image 'alpha-1' is not built" in text
        assert "vmsandbox images build alpha-1 --image-path=images" in text
        assert not (some_qemu.path / "runtime").exists()

    def test_skips_where_that_is_asked_for(self, some_qemu):
        some_qemu.write(USES)
        result = some_qemu.run_apart("-rs", "--vm-missing=skip")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(["SKIPPED*the image 'alpha-1' is not built*"])

    @pytest.mark.usefixtures("inside")
    def test_skips_tests_inside_guests(self, some_qemu):
        some_qemu.write(INSIDE)
        result = some_qemu.run_apart("-rs", "--vm-missing=skip")
        result.assert_outcomes(skipped=1)
        result.stdout.fnmatch_lines(["SKIPPED*the image 'alpha-1' is not built*"])

    def test_a_damaged_one_is_never_skipped(self, some_qemu):
        definition = Catalogue([some_qemu.path / "images"]).get("alpha-1")
        store = ImageStore(cache_dir())
        (store.root / store.key(definition)).mkdir(parents=True)  # without a record
        some_qemu.write(USES)
        result = some_qemu.run_apart("--vm-missing=skip")
        result.assert_outcomes(errors=1)
        assert "the image 'alpha-1' is damaged" in result.stdout.str()

    def test_a_wrong_name_is_never_skipped(self, some_qemu):
        some_qemu.write("def test_x(vm_factory):\n    with vm_factory.boot('gamma'): pass")
        result = some_qemu.run_apart("--vm-missing=skip")
        result.assert_outcomes(failed=1)
        assert "there is no image 'gamma'" in result.stdout.str()
