"""Tests on kernels of the user: which tests there are, what they are called, and what guests they get."""

import json

import pytest

from support import images
from support.kernels import GOOD, kernel, tree

SUITE = """
    import unittest

    import pytest

    @pytest.mark.parametrize("n", [0, 1])
    def test_p(vm, n):
        assert n

    @pytest.mark.vm(kernel=["old", "image"])
    def test_marked(vm): pass

    class TestOld(unittest.TestCase):
        def test_case(self): pass
"""


@pytest.fixture
def kernels(suite):
    """A suite with three kernels, two of them of one release."""
    kernel(suite.path / "old", "6.1.7")
    kernel(suite.path / "new", "6.12.9")
    kernel(suite.path / "other", "6.12.9")
    suite.write(SUITE)
    return suite


def test_one_kernel(kernels):
    assert kernels.ids("--vm-kernel=new") == [
        "test_p[alpha-1+6.12.9-0]",
        "test_p[alpha-1+6.12.9-1]",
        "TestOld::test_case",
        "test_marked[alpha-1+6.1.7]",
        "test_marked[alpha-1]",
    ]


def test_a_matrix(kernels):
    args = ["--vm-kernel=new", "--vm-kernel=other", "--vm-kernel=image", "--vm=alpha-*"]
    assert kernels.ids(*args, "-k", "test_p and 1") == [
        f"test_p[alpha-{image}{release}-1]"
        for image in (1, 2)
        for release in ("+6.12.9", "+6.12.9.2", "")
    ]


def test_names_do_not_depend_on_what_is_collected(kernels):
    kernel(kernels.path / "old", "6.12.9")  # as the one of the option, and first in the file
    kernels.write("""
        import pytest

        @pytest.mark.vm(kernel="old")
        def test_marked(vm): pass

        def test_other(vm): pass
    """)
    ids = ["test_marked[alpha-1+6.12.9.2]", "test_other[alpha-1+6.12.9]"]
    assert kernels.ids("--vm-kernel=new") == ids
    assert kernels.ids("--vm-kernel=new", f"test_suite.py::{ids[0]}") == ids[:1]


def test_the_ini_key_is_relative_to_the_rootdir(kernels, monkeypatch):
    ini = (kernels.path / "pytest.ini").read_text()
    kernels.ini(f"{ini}vm_kernel = new image\n")
    (kernels.path / "sub").mkdir()
    monkeypatch.chdir(kernels.path / "sub")
    ids = ["test_p[alpha-1+6.12.9-1]", "test_p[alpha-1-1]"]
    assert kernels.ids("..", "-k", "test_p and 1") == ids
    assert kernels.ids("..", "--vm-kernel=../old", "-k", "test_p and 1") == [
        "test_p[alpha-1+6.1.7-1]"
    ]


@pytest.mark.parametrize(
    ("args", "ids"),
    [
        (["-k", "6.12.9"], ["test_p[alpha-1+6.12.9-0]", "test_p[alpha-1+6.12.9-1]"]),
        (["-k", "alpha-1+6.12.9 and 0"], ["test_p[alpha-1+6.12.9-0]"]),
        (["-k", "alpha-1 and test_p and 1"], ["test_p[alpha-1+6.12.9-1]"]),
        (["-k", "12"], []),
        (["test_suite.py::test_p[1]"], ["test_p[alpha-1+6.12.9-1]"]),
        (["test_suite.py::test_p[alpha-1+6.12.9-1]"], ["test_p[alpha-1+6.12.9-1]"]),
        (["--deselect=test_suite.py::test_p[1]", "-k", "test_p"], ["test_p[alpha-1+6.12.9-0]"]),
    ],
)
def test_selecting(kernels, args, ids):
    assert kernels.ids("--vm-kernel=new", *args) == ids


def test_guests_boot_it(kernels):
    result = kernels.run("--vm-kernel=new", "-k", "test_p or marked", "--junitxml=report.xml")
    result.assert_outcomes(passed=3, failed=1)
    at = kernels.path
    assert [line for line in kernels.guests if line.startswith("boot")] == [
        f"boot alpha-1-1 kernel={at}/new",
        f"boot alpha-1-2 kernel={at}/new",
        f"boot alpha-1-3 kernel={at}/old",
        "boot alpha-1-4",
    ]
    assert 'name="test_p[alpha-1+6.12.9-0]"' in (at / "report.xml").read_text()


def test_what_failed_runs_again_on_the_next_build(kernels):
    first = kernels.run_apart("--vm-kernel=new", "-p", "cacheprovider", "-k", "test_p")
    first.assert_outcomes(passed=1, failed=1)
    kernel(kernels.path / "new", "6.12.9-00001-gdeadbeef")
    again = kernels.run_apart("--vm-kernel=new", "-p", "cacheprovider", "--lf", "-n1")
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["*test_p?alpha-1+6.12.9-00001-gdeadbeef-0?*"])
    cached = kernels.path / ".pytest_cache/v/cache/lastfailed"
    assert len(json.loads(cached.read_text())) == 1


def test_workers_agree(kernels):
    result = kernels.run_apart("--vm-kernel=new", "--vm-kernel=other", "-n2", "-k", "test_p")
    result.assert_outcomes(passed=2, failed=2)


def test_tests_that_cannot_be_parametrized_run_on_the_first_kernel(kernels):
    kernels.write("""
        import unittest, pytest

        class TestIt(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def guest(self, vm):
                self.vm = vm

            def test_case(self): pass
    """)
    result = kernels.run("--vm-kernel=new", "--vm-kernel=old")
    result.assert_outcomes(passed=1)
    assert kernels.guests[0] == f"boot alpha-1-1 kernel={kernels.path}/new"
    result.stdout.fnmatch_lines(["*ran on alpha-1+6.12.9 only, the first of the selected kernels*"])


def test_wrong_kernels(kernels):
    said = kernels.usage_error("--vm-kernel=none")
    assert said.count("the kernel") == 1
    assert f"the kernel's file {kernels.path}/none cannot be read: No such file" in said
    assert "Remedy: check the path" in said
    assert kernels.guests == []
    assert "kernel='' is not the path of a kernel" in kernels.usage_error("--vm-kernel=")


MARKED = """
    import pytest

    @pytest.mark.vm(kernel=["nope", "old", "nor/this"])
    @pytest.mark.parametrize("n", [0, 1])
    def test_wrong(vm, n): pass

    @pytest.mark.skip
    @pytest.mark.vm(kernel="neither")
    def test_later(vm): pass

    def test_good(vm): pass
"""


@pytest.mark.parametrize("args", [["-k", "good"], ["--deselect=test_suite.py::test_wrong"]])
def test_a_wrong_kernel_in_a_marker_does_not_stop_other_tests(kernels, args):
    kernels.write(MARKED)
    result = kernels.run(*args)
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] == 1


def test_a_wrong_kernel_in_a_marker_names_the_test(kernels):
    kernels.write(MARKED)
    said = kernels.usage_error()
    for name, label in (("nope", "unusable"), ("nor/this", "unusable.2")):
        text = f"test_suite.py::test_wrong[alpha-1+{label}-0] and 1 more: the kernel's file {kernels.path}/{name} "
        assert said.count(f"{text}cannot be read") == 1
    assert "neither" not in said
    assert kernels.guests == []


@pytest.mark.parametrize("value", ["7", "[]", "['new', None]", "''"])
def test_wrong_values_in_a_marker(kernels, value):
    kernels.write(f"""
        import pytest

        @pytest.mark.vm(kernel={value})
        def test_it(vm): pass
    """)
    said = kernels.usage_error()
    assert "test_suite.py::test_it: kernel=" in said
    assert "is not the path of a kernel" in said


def test_a_kernel_that_lacks_an_option(kernels):
    config = GOOD.replace("CONFIG_BLK_DEV_INITRD=y\n", "")
    tree(kernels.path / "built", config=config)
    said = kernels.usage_error("--vm-kernel=built")
    assert "(6.12.9" in said or "the kernel 6.12.9" in said
    assert "it was built without CONFIG_BLK_DEV_INITRD=y" in said


def test_an_image_that_cannot_boot_it(kernels):
    text = images.toml(disk=True).replace('append = ""', 'firmware = "uefi"')
    file = kernels.path / "images/alpha-2/image.toml"
    file.write_text(f'{text}\n[login]\nmethod = "vagrant"\n')
    said = kernels.usage_error("--vm-kernel=new", "--vm=alpha-2", "-k", "test_p")
    assert "kernel= cannot be used with alpha-2" in said
