"""Which tests run inside a guest, and what is invalid. Nothing is booted here."""

from __future__ import annotations

import pytest


def test_ids_carry_the_image(suite):
    suite.write("""
        import pytest

        @pytest.mark.in_vm
        @pytest.mark.vm("alpha-*")
        @pytest.mark.parametrize("x", ["a", "b"])
        def test_in(x): pass

        @pytest.mark.in_vm
        class TestIt:
            def test_method(self): pass

        def test_here(): pass
    """)
    assert suite.ids("--vm=alpha-1", "--vm=alpha-2") == [
        "test_in[alpha-1-a]",
        "test_in[alpha-1-b]",
        "TestIt::test_method[alpha-1]",
        "test_here",
        "test_in[alpha-2-a]",
        "test_in[alpha-2-b]",
        "TestIt::test_method[alpha-2]",
    ]


SUITE = """
    import unittest

    import pytest

    def test_plain(): pass

    def test_drives(vm): pass

    def test_boots(vm_factory): pass

    @pytest.mark.in_vm(False)
    def test_stays(): pass

    class TestOld(unittest.TestCase):
        def test_case(self): pass
"""


@pytest.mark.parametrize("how", ["--in-vm", "-ovm_inside=true"])
def test_a_whole_suite(suite, how):
    """Those that drive a guest stay here, and those that say so."""
    suite.write(SUITE)
    assert sorted(suite.ids(how)) == sorted(
        [
            "TestOld::test_case",
            "test_boots",
            "test_drives[alpha-1]",
            "test_plain[alpha-1]",
            "test_stays",
        ]
    )


def test_what_cannot_be_parametrized_runs_on_the_first_image(suite):
    suite.write(SUITE)
    result = suite.run("--collect-only", "--in-vm", "--vm=alpha-1", "--vm=alpha-2")
    result.stdout.fnmatch_lines(["*ran on alpha-1 only, the first of the selected images*"])


@pytest.mark.parametrize(
    ("source", "args", "text"),
    [
        ("@pytest.mark.in_vm\ndef test_it(vm): pass", (), "cannot drive a guest"),
        ("@pytest.mark.in_vm('tiny')\ndef test_it(): pass", (), "takes no argument but True or False"),
        ("@pytest.mark.in_vm\ndef test_it(): pass", ("--pdb",), "--pdb needs a terminal for tests that run inside"),
        ("@pytest.mark.in_vm\ndef test_it(): pass", ("--trace",), "--trace needs a terminal for tests that run inside"),
        ("@pytest.mark.in_vm\ndef test_it(): pass", ("--setup-plan",), "--setup-plan does not work for"),
        ("@pytest.mark.in_vm\ndef test_it(): pass", ("--setup-only",), "--setup-only does not work for"),
        ("import nothing_of_that_name", ("--in-vm", "--setup-plan"), "--setup-plan does not work for"),
        (
            "@pytest.mark.in_vm\n@pytest.mark.vm(test_timeout=0)\ndef test_it(): pass", (),
            "test_timeout=0 is not a positive number",
        ),
        (
            "@pytest.mark.in_vm\n@pytest.mark.vm(isolation='none')\ndef test_it(): pass", (),
            "isolation='none' is unknown",
        ),
        ("@pytest.mark.in_vm\ndef test_it(): pass", ("-ovm_env=a b",), "write NAME or NAME=VALUE"),
        (
            "@pytest.mark.in_vm\ndef test_it(): pass", ("-ovm_isolation=all",),
            "vm_isolation = 'all' is invalid\nRemedy: use one of test, module, session",
        ),
        (
            "@pytest.mark.in_vm\ndef test_it(): pass", ("-ovm_test_timeout=soon",),
            "vm_test_timeout='soon' is not a positive number of seconds",
        ),
        ("@pytest.mark.in_vm\ndef test_it(): pass", ("--vm=typo",), "there is no image 'typo'"),
    ],
)  # fmt: skip
def test_usage_errors(suite, source, args, text):
    suite.write(f"import pytest\n\n{source}\n")
    assert text in suite.usage_error(*args)


@pytest.mark.parametrize("option", ["--pdb", "--trace", "--setup-plan", "--setup-only"])
def test_what_cannot_reach_a_guest_is_no_error_where_no_test_is_left(suite, option):
    suite.write("import pytest\n\n@pytest.mark.in_vm\ndef test_it(): pass")
    result = suite.run(option, "-m", "not in_vm")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_setup_show_shows_nothing_of_a_guest(suite):
    suite.write("import pytest\n\n@pytest.mark.in_vm\ndef test_it(): pass\n\ndef test_here(): pass")
    text = "vmsandbox: --setup-show shows nothing for tests that run inside a guest"
    assert text in suite.run("--setup-show").outlines
    assert text not in suite.run("--setup-show", "-k", "here").outlines


def test_an_image_without_python(suite):
    """It is no usage error: with `--vm=all` the rest of the run goes on."""
    suite.write("import pytest\n\n@pytest.mark.in_vm\ndef test_it(): pass\n\ndef test_here(): pass")
    result = suite.run()
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*tests cannot run inside alpha-1: this image has no Python"])
    assert suite.guests == []


def test_an_image_whose_python_is_too_old(suite):
    for name, python in (("alpha-1", '"3.8"'), ("beta", '"3.9"'), ("alpha-2", '"2.7"')):
        file = suite.path / "images" / name / "image.toml"
        file.write_text(file.read_text().replace("python = false", f"python = {python}"))
    suite.write("import pytest\n\n@pytest.mark.in_vm\ndef test_it(): pass")
    result = suite.run()
    result.assert_outcomes(errors=1)
    why = "this image has Python 3.8, but they need 3.9 or newer"
    result.stdout.fnmatch_lines([f"*tests cannot run inside alpha-1: {why}"])
    assert "inside debian-13 or beta or debian" in result.stdout.str()
    assert suite.guests == []


def test_skipped_by_its_marker_without_a_guest(suite):
    suite.write("""
        import pytest

        @pytest.mark.in_vm
        @pytest.mark.vm(skip={"alpha-*": "not there"})
        def test_it(): pass
    """)
    result = suite.run("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*not there"])
    assert suite.guests == []


def test_a_file_that_cannot_be_imported_here(suite):
    """Under --in-vm it is the guest's; when nothing may be booted, it is an error as ever."""
    suite.write("import nothing_of_that_name")
    result = suite.run("--collect-only", "--in-vm")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*No module named 'nothing_of_that_name'"])
    result = suite.run("--in-vm")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of test_suite.py?alpha-1?*"])
