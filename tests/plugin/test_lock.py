"""The lock file in a run: no guest starts on an image that is not the locked one."""

import shutil
import sys

import pytest

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.lock import Lock, LockedImage
from pytest_vmsandbox.core.paths import LOCK_FILE
from pytest_vmsandbox.guests import factory
from support import images

assert factory  # imported once: see conftest.py
USES = "def test_x(vm): pass"
MISMATCH = "differs from vm-images.lock"
LAUNCHED = (
    "[launch]"  # the fake QEMU only says its version; a run that starts it has passed the check
)


@pytest.fixture
def project(bare, monkeypatch):
    """A project with a lock, whose images are built; and a program that says that it is QEMU."""
    program = bare.path / "qemu-system-fake"
    program.write_text(f"#!{sys.executable} -IS\nprint('QEMU emulator version 9.9.9')\n")
    program.chmod(0o755)
    monkeypatch.setenv("VMSANDBOX_QEMU", str(program))
    bare.ini("[pytest]\nvm_image_path = images\nvm_images = alpha-1\nvm_accel = tcg\n")
    bare.write(USES)
    lock(bare, "alpha-1", "alpha-2")
    return bare


def keep(suite, name, packages="openssl 3.0.15\n"):
    definition = Catalogue([suite.path / "images"]).get(name)
    return images.keep(suite.path / "cache", definition, packages=packages)


def lock(suite, *names):
    entries = [LockedImage.of(keep(suite, name)) for name in names]
    (suite.path / LOCK_FILE).unlink(missing_ok=True)
    Lock(suite.path / LOCK_FILE, {}).add(entries)


def failing(suite, *args, errors=1):
    """Run what must be errors of tests; what it says."""
    result = suite.run(*args)
    result.assert_outcomes(errors=errors)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    return result.stdout.str()


def test_the_locked_image_is_used(project):
    text = failing(project)
    assert LAUNCHED in text
    assert "vmsandbox: images must be as in vm-images.lock" in text
    assert MISMATCH not in text


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_no_guest_starts_on_another_image(project, missing):
    python = project.path / "images" / "alpha-1" / "image.toml"
    python.write_text(python.read_text().replace("python = false", "python = true"))
    lock(project, "alpha-1", "alpha-2")
    keep(project, "alpha-1", "openssl 3.0.16\n")
    (project.path / "images" / "alpha-2" / "more").write_text("more")  # a build would not help
    keep(project, "beta")
    project.write("import pytest\n@pytest.mark.in_vm\ndef test_y(): pass", "test_inside")
    text = failing(
        *(project, "--vm=alpha-*", "--vm=beta", "--deselect=test_inside.py::test_y[alpha-2]"),
        *("--deselect=test_inside.py::test_y[beta]", f"--vm-missing={missing}"),
        errors=4,
    )
    assert LAUNCHED not in text
    assert text.count(f"[image] the image 'alpha-1' {MISMATCH}: packages") >= 2
    assert f"expected in {project.path / LOCK_FILE} → found here:" in text
    assert "packages: openssl 3.0.15 → 3.0.16" in text
    assert "Remedy: run 'vmsandbox images update alpha-1'" in text
    assert f"[image] the image 'alpha-2' {MISMATCH}: definition" in text
    assert "[image] the image 'beta' is not in vm-images.lock" in text
    assert "found: alpha-1, alpha-2" in text
    assert "Remedy: vmsandbox images lock beta" in text
    before = text.partition("= ERRORS =")[0]
    for line in ("'alpha-1' differs", "'alpha-2' differs", "'beta' is not in"):
        assert f"vmsandbox: the image {line}" in before  # nobody has to wait for the last test


def test_a_missing_image_is_an_error_as_without_a_lock(project):
    lock(project, "alpha-1", "beta")
    shutil.rmtree(project.path / "cache" / "images" / "beta")
    assert "the image 'beta' is not built" in failing(project, "--vm=beta")
    project.run("--vm=beta", "--vm-missing=skip").assert_outcomes(skipped=1)


def test_in_workers(project):
    keep(project, "alpha-1", "openssl 3.0.16\n")
    result = project.run_apart("-n2")
    result.assert_outcomes(errors=1)
    assert f"the image 'alpha-1' {MISMATCH}: packages" in result.stdout.str()


def test_packages_that_may_drift_are_told(project):
    file = project.path / LOCK_FILE
    text = file.read_text().replace('    "packages",\n', "", 1)
    file.write_text(text.replace('    "files",', '    "files",\n    "packages",', 1))
    keep(project, "alpha-1", "openssl 3.0.16\n")
    text = failing(project)
    assert LAUNCHED in text
    assert "the lock allows alpha-1 to have other packages: 1 differ" in text


def test_a_lock_that_cannot_be_read_ends_the_run(project):
    (project.path / LOCK_FILE).write_text("<<<<<<< HEAD\n")
    assert "conflict markers" in project.usage_error()
    project.write("def test_plain(): pass", name="test_plain")
    project.run("test_plain.py").assert_outcomes(passed=1)  # needs no guest


def test_the_lock_at_the_rootdir_counts(project):
    """Not one in the current folder, or in a folder with tests."""
    below = project.pytester.mkdir("below")
    (project.path / "test_suite.py").rename(below / "test_suite.py")
    (below / LOCK_FILE).write_text("no lock at all")
    assert LAUNCHED in failing(project, "below")
    elsewhere = ("below", "-c", "pytest.ini", "--rootdir=below")
    assert "vm-images.lock cannot be read" in project.usage_error(*elsewhere)
    (below / LOCK_FILE).unlink()
    text = failing(project, *elsewhere)
    assert LAUNCHED in text
    unused = project.path / LOCK_FILE
    assert f"vmsandbox: {unused} does not count, because pytest's rootdir is {below}" in text


def test_a_link_to_a_lock(project):
    file = project.path / LOCK_FILE
    file.rename(project.path / "elsewhere")
    file.symlink_to("elsewhere")
    keep(project, "alpha-1", "openssl 3.0.16\n")
    assert MISMATCH in failing(project)
    (project.path / "elsewhere").unlink()
    assert "vm-images.lock cannot be read" in project.usage_error()
