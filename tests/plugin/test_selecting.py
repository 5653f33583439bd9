"""A test is selected by its plain id and name, too; ids that are shown carry the image."""

import pytest

SUITE = """
    import unittest

    import pytest

    @pytest.mark.parametrize("n", [0, 1, 2])
    def test_p(n): pass

    class TestIt:
        @pytest.mark.parametrize("b", "xy")
        @pytest.mark.parametrize("a", ["p[q]", "r::s"])
        def test_m(self, a, b): pass

    class TestOld(unittest.TestCase):
        def test_case(self): pass

    def test_f():
        raise AssertionError
"""
P = "test_p[alpha-1-{}]"


@pytest.fixture
def inside(suite):
    """A suite whose tests run inside guests."""
    suite.write(SUITE)
    suite.select = lambda *args: suite.ids("--in-vm", *args)
    return suite


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("test_p and not 1", [P.format(0), P.format(2)]),
        ("1", [P.format(1)]),
        ("p-1 or 1-2", []),  # the end of the image's name, and what follows
        ("ALPHA", []),
        ("test_p and ALPHA-1", [P.format(0), P.format(1), P.format(2)]),
        ("test_p[2]", [P.format(2)]),
        (P.format(2), [P.format(2)]),
        ("alpha-1-2", [P.format(2)]),
        ("not alpha-1", []),
        ("alpha-1 and case", ["TestOld::test_case"]),
        ("alpha-2", []),
        ("s-y", ["TestIt::test_m[alpha-1-r::s-y]"]),
    ],
)
def test_words(inside, words, ids):
    assert inside.select("-k", words) == ids


@pytest.mark.parametrize("name", ["test_f[alpha-2]", "test_p[alpha-2-1]"])
def test_an_id_with_an_image_that_is_not_selected(inside, name):
    result = inside.run("--in-vm", f"test_suite.py::{name}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = result.stderr.str()
    assert f"test_suite.py::{name} names the image alpha-2, which is not selected" in said
    assert "Remedy: add --vm=alpha-2" in said
    assert inside.select("--vm=alpha-2", f"test_suite.py::{name}") == [name]


def test_an_id_that_is_wrong_otherwise(inside):
    result = inside.run("--in-vm", "test_suite.py::test_f[alpha-1-7]")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is not selected" not in result.stderr.str()


def test_words_choose_among_images(inside):
    found = inside.select("--vm=alpha-*", "-k", "alpha-2 and test_p")
    assert found == [f"test_p[alpha-2-{n}]" for n in range(3)]


@pytest.mark.parametrize(
    ("named", "ids"),
    [
        ("test_p[2]", [P.format(2)]),
        (P.format(2), [P.format(2)]),
        ("test_p", [P.format(0), P.format(1), P.format(2)]),
        ("TestIt::test_m[p[q]-x]", ["TestIt::test_m[alpha-1-p[q]-x]"]),
        ("TestIt::test_m[r::s-y]", ["TestIt::test_m[alpha-1-r::s-y]"]),
        ("TestOld::test_case", ["TestOld::test_case"]),
    ],
)
def test_ids_on_the_command_line(inside, named, ids):
    assert inside.select(f"test_suite.py::{named}") == ids


def test_a_plain_id_means_the_test_on_each_image(inside):
    found = inside.select("--vm=alpha-*", "test_suite.py::test_p[2]")
    assert found == ["test_p[alpha-1-2]", "test_p[alpha-2-2]"]


def test_a_plain_id_that_is_none_is_told_by_pytest(inside):
    assert "not found" in inside.usage_error("--in-vm", "test_suite.py::test_p[3]")


@pytest.mark.parametrize("how", [("--in-vm",), ("--in-vm", "--vm=alpha-*"), ()])
def test_what_is_shown_can_be_pasted(inside, how):
    shown = [f"test_suite.py::{nodeid}" for nodeid in inside.ids(*how)]
    assert [f"test_suite.py::{it}" for it in inside.ids(*how, *shown)] == shown


def test_tests_that_drive_a_guest_are_known_by_plain_ids(suite):
    suite.write("""
        import pytest

        @pytest.mark.parametrize("n", [1, 2])
        def test_drives(vm, n): assert n == 2
    """)
    suite.run("test_suite.py::test_drives[2]").assert_outcomes(passed=1)
    suite.run("-k", "not 1").assert_outcomes(passed=1, deselected=1)


def test_deselecting_by_the_beginning_of_a_plain_id(inside):
    out = ["--deselect=test_suite.py::test_p[1]", "--deselect=test_suite.py::TestIt::test_m[p"]
    found = inside.select(*out, "-k", "test_p or test_m")
    assert found == [
        P.format(0),
        P.format(2),
        "TestIt::test_m[alpha-1-r::s-x]",
        "TestIt::test_m[alpha-1-r::s-y]",
    ]


def test_names_are_ordinary_where_selecting_is_over(inside):
    conftest = inside.path / "conftest.py"
    conftest.write_text(
        conftest.read_text() + "\ndef pytest_collection_finish(session):\n"
        "    assert {type(item.name) for item in session.items} == {str}\n"
    )
    assert inside.run("--co", "--in-vm").ret == pytest.ExitCode.OK


class TestFormerRuns:
    """pytest remembers tests by ids, in its cache."""

    @pytest.fixture(autouse=True)
    def own(self, inside, monkeypatch):
        self.pytester = inside.pytester
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(self, *args):
        return self.pytester.runpytest_inprocess("-p", "pytest_vmsandbox.plugin", *args)

    def shown(self, *args):
        lines = self.run("--co", "-q", *args).outlines
        return [line.partition("::")[2] for line in lines if "::" in line]

    def remember(self, nodeid):
        self.cache.parent.mkdir(parents=True)
        self.cache.write_text(f'{{"test_suite.py::{nodeid}": true}}')

    @property
    def cache(self):
        return self.pytester.path / ".pytest_cache" / "v" / "cache" / "lastfailed"

    @pytest.mark.parametrize(
        ("args", "ids"),
        [
            (["--lf"], ["test_f[alpha-1]"]),
            (["--lf", "--vm=alpha-*"], ["test_f[alpha-1]", "test_f[alpha-2]"]),
            (["--ff", "-k", "test_f or test_p"], ["test_f[alpha-1]", *map(P.format, range(3))]),
            (["--sw"], ["test_f[alpha-1]"]),
        ],
    )
    def test_a_plain_run_and_then_one_inside(self, args, ids):
        self.run("--sw" if "--sw" in args else "-v").assert_outcomes(passed=8, failed=1)
        assert self.shown("--in-vm", *args) == ids

    def test_a_run_inside_and_then_a_plain_one(self):
        self.remember("test_f[alpha-1]")
        assert self.shown("--lf") == ["test_f"]
        self.run("--lf").assert_outcomes(failed=1)
        assert self.shown("--lf", "--in-vm") == ["test_f[alpha-1]"]

    def test_a_class_and_a_parameter(self):
        self.remember("TestIt::test_m[r::s-x]")
        assert self.shown("--lf", "--in-vm") == ["TestIt::test_m[alpha-1-r::s-x]"]

    def test_what_failed_on_one_image_does_not_run_on_another(self):
        self.remember("test_f[alpha-1]")
        assert self.shown("--lf", "--in-vm", "--vm=alpha-*") == ["test_f[alpha-1]"]

    @pytest.mark.parametrize("how", [(), ("-p", "xdist", "-n1")], ids=["", "xdist"])
    def test_what_passes_is_forgotten(self, how):
        """Also by the controller of xdist, which collects nothing."""
        self.remember("test_p[alpha-1-1]")
        self.pytester.runpytest_subprocess(
            "-p", "pytest_vmsandbox.plugin", "--lf", *how, timeout=60
        ).assert_outcomes(passed=1)
        assert self.cache.read_text() == "{}"

    def test_new_ones_first(self):
        self.run("-k", "not test_f")
        assert self.shown("--nf", "--in-vm")[0] == "test_f[alpha-1]"
