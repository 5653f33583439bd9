"""Each of pytest's own settings means inside a guest what it means to plain pytest.

The guest is this machine, as in `test_outcomes`.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from _pytest.config import default_plugins, essential_plugins

from support import fidelity
from support.fidelity import Line
from support.sides import INSIDE, Sides

# -- the tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Row:
    """A setting, and tests that come out differently with it.

    Attributes:
        name: the ini key, or what pytest calls the option (its ``dest``).
        how: a line of the ini file, or arguments, which start with ``-``.
        files: path → text.
    """

    name: str
    how: str
    files: dict[str, str]

    @property
    def is_option(self):
        return self.how.startswith("-")


def row(name, how, text="", files=None):
    """A row; `text` is that of a module of tests, which is called like the setting."""
    own = {f"test_{name}.py": text} if text else {}
    return Row(name, how, {**own, **(files or {})})


FAILS = "def test_fails():\n    value = [1, 2]\n    print('printed')\n    assert value == [1, 3]\n"
LONG = "def test_fails(): assert 'a\\nb\\nc\\nd\\ne\\nf' == 'b\\nc\\nd\\ne\\nf\\ng'\n"
HIDES = "def helper():\n    __tracebackhide__ = True\n    assert 0\n\ndef test_hides(): helper()\n"
WARNS = "import warnings\n\ndef test_warns():\n    warnings.warn('of %s')\n"
LOGS = "import logging\n\ndef test_logs():\n    logging.{}('one\\ntwo')\n    assert 0\n"
XPASSES = "import pytest\n\n@pytest.mark.xfail\ndef test_passes(): pass\n"
XFAILS = XPASSES.replace("pass\n", "assert 0\n")
MARKS = """
import warnings, pytest

def test_marks():
    with warnings.catch_warnings(action={action!r}):
        assert pytest.mark.{name}
"""
# What is caught depends on the levels of all handlers, live ones and those of files.
CAUGHT = """
import logging

def test_caught(caplog):
    logging.debug("debugging")
    assert not caplog.records
"""
DOCTESTS = {"documented.py": '"""\n>>> print("a\\\\nb")\na\nc\n>>> 1\n2\n"""\n'}

CONFTEST = """
import os

import pytest

ASSERTED = []

def pytest_assertion_pass(item, lineno, orig, expl):
    ASSERTED.append(orig)

@pytest.fixture
def asserted():
    return ASSERTED

@pytest.fixture
def of_usefixtures(monkeypatch):
    monkeypatch.setenv("OF_USEFIXTURES", "1")
"""

# The rows of a group are tried in one run; each of them must make a difference to that.
GROUPS = {
    "outcomes": [
        row("empty_parameter_set_mark", "empty_parameter_set_mark = xfail",
            "import pytest\n\n@pytest.mark.parametrize('a', [])\ndef test_a(a): pass\n"),
        row("filterwarnings", "filterwarnings = error:of filterwarnings", WARNS % "filterwarnings"),
        row("usefixtures", "usefixtures = of_usefixtures",
            "import os\n\ndef test_a():\n    if 'OF_USEFIXTURES' in os.environ: raise ValueError\n"),
        row("python_files", "python_files = test_*.py check_*.py", files={"check_it.py": FAILS}),
        row("python_classes", "python_classes = Test Check",
            "class CheckIt:\n    def test_a(self): assert 0\n"),
        row("python_functions", "python_functions = test check", "def check_a(): assert 0\n"),
        row("pythonpath", "pythonpath = further", "def test_a(): import of_pythonpath\n",
            {"further/of_pythonpath.py": ""}),
        row("collect_imported_tests", "collect_imported_tests = false",
            "from imported import test_imported\n\ndef test_a(): pass\n",
            {"imported.py": "def test_imported(): assert 0\n"}),
        row("disable_test_id_escaping_and_forfeit_all_rights_to_community_support",
            "disable_test_id_escaping_and_forfeit_all_rights_to_community_support = true",
            "import pytest\n\n@pytest.mark.parametrize('a', ['ü'])\ndef test_a(a): assert 0\n"),
        row("parametrize_long_str_id_strategy", "parametrize_long_str_id_strategy = sha256",
            "import pytest\n\n@pytest.mark.parametrize('a', ['a' * 200])\ndef test_a(a): assert 0\n"),
        row("doctest_optionflags", "doctest_optionflags = NORMALIZE_WHITESPACE",
            files={"test_flags.txt": ">>> print('a  b')\na b\n"}),
        row("doctest_encoding", "doctest_encoding = latin-1",
            files={"test_encoding.txt": ">>> print(len('é'))\n1\n"}),
        row("enable_assertion_pass_hook", "enable_assertion_pass_hook = true",
            "def test_a(asserted):\n    assert 1 == 1\n    if asserted: raise ValueError(asserted)\n"),
        row("assertion_text_diff_style", "assertion_text_diff_style = block",
            "def test_a(): assert 'a\\nb\\nc' == 'a\\nx\\nc'\n"),
        row("truncation_limit_lines", "truncation_limit_lines = 3", LONG),
        row("log_format", "log_format = %(asctime)s FORMAT %(message)s", LOGS.format("warning")),
        row("log_date_format", "log_date_format = DAY"),
        row("log_auto_indent", "log_auto_indent = true"),
        row("log_level", "log_level = DEBUG", CAUGHT),
        row("markers", "markers = of_markers: known", MARKS.format(action="error", name="of_markers")),
        row("tmp_path_retention_policy", "tmp_path_retention_policy = failed",
            "KEPT = []\n\ndef test_a(tmp_path): KEPT.append(tmp_path)\n\n"
            "def test_b(): assert KEPT[0].exists()\n"),
        row("norecursedirs", "norecursedirs = unwanted", files={"unwanted/test_there.py": FAILS}),
        row("strict_xfail", "strict_xfail = true", XPASSES),
        row("strict_markers", "strict_markers = true", MARKS.format(action="ignore", name="unknown")),
    ],
    "strict": [row("strict", "strict = true", XPASSES)],
    "strict, as an option": [row("strict", "--strict", MARKS.format(action="ignore", name="unknown"))],
    "xfail, by its former name": [row("xfail_strict", "xfail_strict = true", XPASSES)],
    "chars": [row("truncation_limit_chars", "truncation_limit_chars = 30",
                  "def test_fails(): assert 'a' * 80 + '\\nb' == 'a' * 80 + '\\nc'\n")],
    "verbosity": [
        row("verbosity_assertions", "verbosity_assertions = 2", FAILS),
        row("verbosity_test_cases", "verbosity_test_cases = 0"),
        row("verbosity_subtests", "verbosity_subtests = 0",
            "def test_a(subtests):\n    for n in range(2):\n        with subtests.test(n=n): assert n\n"),
        row("verbose", "-v"),
    ],
    "namespace packages": [
        row("consider_namespace_packages", "consider_namespace_packages = true",
            files={"outer/inner/__init__.py": "",
                   "outer/inner/test_name.py": "def test_a(): assert __name__ == 'inner.test_name'\n"}),
    ],
    "live log": [row("log_cli_level", "log_cli_level = DEBUG", CAUGHT)],
    "live log, as an option": [row("log_cli_level", "--log-cli-level=DEBUG", CAUGHT)],
    "log file": [row("log_file_level", "log_file_level = DEBUG", CAUGHT)],
    "log file, as an option": [row("log_file_level", "--log-file-level=DEBUG", CAUGHT)],
    "log, as an option": [
        row("log_level", "--log-level=DEBUG", CAUGHT),
        row("log_format", "--log-format='%(asctime)s FORMAT %(message)s'", LOGS.format("warning")),
        row("log_date_format", "--log-date-format=DAY"),
        row("log_auto_indent", "--log-auto-indent=true"),
        row("logger_disable", "--log-disable=noisy",
            "import logging\n\ndef test_logs():\n    logging.getLogger('noisy').error('of it')\n    assert 0\n"),
    ],
    "junit": [
        row("junit_logging", "-o junit_logging=system-out", FAILS),
        row("junit_log_passing_tests", "junit_log_passing_tests = false", "def test_a(): print('printed')\n"),
        row("junit_family", "junit_family = xunit1",
            "def test_a(record_xml_attribute): record_xml_attribute('a', 'b')\n"),
        row("junitprefix", "--junit-prefix=before"),
    ],
    "where tests are": [
        row("testpaths", "testpaths = wanted", FAILS, {"wanted/test_there.py": FAILS}),
        row("addopts", "addopts = --runxfail", files={"wanted/test_addopts.py": XFAILS}),
    ],
    "warnings": [row("max_warnings", "max_warnings = 0", WARNS % "max_warnings")],
    "warnings, as an option": [row("max_warnings", "--max-warnings=0", WARNS % "max_warnings")],
    # Plain pytest does not start, or collect.
    "version": [row("minversion", "minversion = 99", FAILS)],
    "required": [row("required_plugins", "required_plugins = pytest-no-such", FAILS)],
    "strict keys": [row("strict_config", "--strict-config", FAILS), row(None, "no_such_key = 1")],
    "chosen": [
        row("keyword", "-k 'not of_keyword'", "def test_of_keyword(): assert 0\n\ndef test_a(): pass\n"),
        row("markexpr", "-m 'not skipif'",
            "import pytest\n\n@pytest.mark.skipif(False, reason='')\ndef test_a(): assert 0\n"),
        row("deselect", "--deselect test_deselect.py::test_a", "def test_a(): assert 0\n"),
        row("ignore", "--ignore=test_ignore.py", "def test_a(): assert 0\n"),
        row("ignore_glob", "--ignore-glob='*_glob.py'", "def test_a(): assert 0\n",
            {"test_of_glob.py": "def test_a(): assert 0\n"}),
        row("collect_in_virtualenv", "--collect-in-virtualenv",
            files={"env/pyvenv.cfg": "", "env/bin/activate": "", "env/test_env.py": FAILS}),
    ],
    "twice": [
        row("keepduplicates", "--keep-duplicates", files={"below/test_there.py": FAILS}),
        row("file_or_dir", "-- below below"),
    ],
    "first ones": [row("maxfail", "--maxfail=1", FAILS + FAILS.replace("fails", "fails_again"))],
    "packages": [row("pyargs", "--pyargs packaged", files={
        "packaged/__init__.py": "", "packaged/test_there.py": FAILS, "test_here.py": FAILS})],
    "what is done": [
        row("pythonwarnings", "-W 'error:of pythonwarnings'", WARNS % "pythonwarnings"),
        row("runxfail", "--runxfail", XFAILS),
        row("doctestmodules", "--doctest-modules", files=DOCTESTS),
        row("doctestglob", "--doctest-glob='*.rst'", files={"documented.rst": ">>> 1\n2\n"}),
        row("doctestreport", "--doctest-report=ndiff"),
        row("assertmode", "--assert=plain", FAILS),
        row("strict_markers", "--strict-markers", MARKS.format(action="ignore", name="unknown")),
        row("doctest_continue_on_failure", "--doctest-continue-on-failure"),
    ],
    "no conftest": [row("noconftest", "--noconftest", "def test_a(asserted): pass\n")],
    "few conftests": [
        row("confcutdir", "--confcutdir=below below", files={"below/test_there.py": "def test_a(asserted): pass\n"})
    ],
    "importing": [
        row("importmode", "--import-mode=importlib", files={"below/test_there.py": """
import sys

def test_a(): assert not sys.path[0].endswith("below")
"""}),
    ],
    "no capture": [row("capture", "--capture=no", "def test_a(capfd):\n    print(1)\n\n" + FAILS)],
    "capture of sys": [
        row("capture", "--capture=sys", "import os\n\ndef test_a():\n    os.write(1, b'bytes')\n    assert 0\n")
    ],
    "what is shown": [
        row("tbstyle", "--tb=short", FAILS),
        row("showlocals", "--showlocals"),
        row("showcapture", "--show-capture=no"),
        row("reportchars", "-rA"),
        row("xfail_tb", "--xfail-tb", files={"test_xfails.py": XFAILS}),
        row("fold_skipped", "--no-fold-skipped",
            files={"test_skips.py": "import pytest\n\n@pytest.mark.skip\ndef test_a(): pass\n"}),
        row("disable_warnings", "--disable-warnings", files={"test_warns.py": WARNS % "it"}),
        row("verbose", "-vv"),
    ],
    "little is shown": [
        row("no_summary", "--no-summary", FAILS), row("verbose", "-q"),
    ],
    "all frames": [row("fulltrace", "--full-trace", HIDES)],
    "stepwise": [row("stepwise", "--sw", FAILS + "\ndef test_b(): pass\n")],
    "stepwise, but for one": [
        row("stepwise_skip", "--sw-skip", FAILS + FAILS.replace("fails", "fails_again") + WARNS)
    ],
}  # fmt: skip
# The screen has lines there that come live, and not those of one side from the other.
LOOSE = {"live log", "live log, as an option", "no capture", "capture of sys"}

# Settings without a row, and why: none of them can change an outcome inside.
WITHOUT_ROW = {
    "the screen, or a file that this side writes, looks otherwise": """
        code_highlight color console_output_style durations durations_min force_short_summary
        junit_duration_report junit_suite_name log_cli log_cli_date_format log_cli_format log_file log_file_date_format
        log_file_format log_file_mode no_header pastebin xmlpath debug traceconfig""",
    "something is printed, and no test runs":
        "cacheshow collectonly help show_fixtures_per_test showfixtures version",
    "it is refused, or told that it shows nothing: test_usage has it":
        "setuponly setupplan setupshow",
    "it opens a debugger at a terminal: tests/plugin/test_inside_debugger.py has it":
        "trace usepdb usepdb_cls",
    "what is chosen and ordered here: test_outcomes has those, with two runs each":
        "cacheclear failedfirst last_failed_no_failures lf newfirst stepwise_reset",
    "a file that this side cannot collect is one test here, and the guest's: below, and in test_outcomes": """
        continue_on_collection_errors doctest_ignore_import_errors strict_parametrization_ids""",
    "where files of pytest's are, or what is left of them after the run":
        "basetemp cache_dir inifilename rootdir tmp_path_retention_count",
    "it is the way to set something, and other rows go it":
        "disable_plugin_autoload override_ini plugins",
    "stacks are written to a stream that nobody captures; or the run ends":
        "faulthandler_exit_on_timeout faulthandler_timeout",
}  # fmt: skip
REASONS = {name for names in WITHOUT_ROW.values() for name in names.split()}
# Not in each pytest that we allow.
NOT_EVERYWHERE = {
    "assertion_text_diff_style", "faulthandler_exit_on_timeout", "force_short_summary",
    "max_warnings", "parametrize_long_str_id_strategy", "strict", "strict_parametrization_ids",
    "strict_xfail", "verbosity_subtests",
}  # fmt: skip


@cache
def known():
    """The settings of the pytest that is installed: its ini keys, their aliases, its options."""
    code = """if True:
        import json, pytest
        class Tell:
            @pytest.hookimpl(tryfirst=True)
            def pytest_cmdline_main(self, config):
                parser = config._parser
                keys = [*parser._inidict, *getattr(parser, "_ini_aliases", {})]
                print(json.dumps([keys, list(vars(config.option))]))
                return 0
        pytest.main(["-c", "/dev/null", "--rootdir=/"], plugins=[Tell()])
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV"))}
    told = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/",
        env={**kept, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    ).stdout  # fmt: skip
    keys, options = json.loads(told)
    return set(keys), set(options)


def there():
    """The groups, with those rows of each whose settings the installed pytest has."""
    keys, options = known()
    found = {
        name: [
            it for it in rows if it.name is None or it.name in (options if it.is_option else keys)
        ]
        for name, rows in GROUPS.items()
    }
    return {name: rows for name, rows in found.items() if any(it.name for it in rows)}


# -- one setting, or several in one run -----------------------------------------------------------------


@pytest.fixture
def folder(tmp_path_factory):
    """One with a short name: the path of a Unix socket has at most 107 characters."""
    return tmp_path_factory.mktemp("f")


def runs_of(folder, rows, *, ordered=True):
    """Runs the tests of some rows: either way, with the settings of such rows as are chosen."""
    files = {path: text for it in rows for path, text in it.files.items()}
    sides = Sides.of(folder, {"conftest.py": CONFTEST, **files})

    @cache
    def run(way, *chosen):
        lines = [it.how for it in chosen if not it.is_option]
        (sides.suite / "pytest.ini").write_text("\n".join(["[pytest]", *lines]))
        args = " ".join(it.how for it in chosen if it.is_option)
        # Modules that pytest has rewritten are kept, whatever it was told then.
        return way(sides, Line.of(args, ordered=ordered, PYTHONDONTWRITEBYTECODE="1"))

    return run


def of_files(run, files):
    """What became of the tests in some files."""
    names = {re.escape(Path(it).stem) for it in files}
    ours = re.compile(rf"testcase classname=\S*\b({'|'.join(names)})\b")
    return [it for it in run.cases if names and ours.match(it)]


@pytest.mark.parametrize("group", there())
def test_it_means_the_same_inside(folder, group):
    rows = there()[group]
    run = runs_of(folder, rows, ordered=group not in LOOSE)
    expected = run(Sides.plain, *rows)
    bare = run(Sides.plain)
    for one in rows:
        if of_files(bare, one.files) == of_files(expected, one.files):  # it is about others, too
            without = run(Sides.plain, *(it for it in rows if it is not one))
            assert without != expected, f"{one.how}: it makes no difference, so this proves nothing"
    assert fidelity.differences(run(Sides.inside, *rows), expected) == []


def test_each_setting_has_a_row_or_a_reason():
    keys, options = known()
    rows = {it.name for them in GROUPS.values() for it in them if it.name is not None}
    assert sorted((keys | options) - rows - REASONS) == [], (
        f"pytest {pytest.__version__} has settings that are new. Does guest_config.py tell a guest what "
        "it has to know of them? Then give each a row in GROUPS, with tests that come out differently "
        "with it, or in WITHOUT_ROW a reason why no outcome can"
    )
    assert sorted((rows | REASONS) - keys - options - NOT_EVERYWHERE) == [], (
        f"pytest {pytest.__version__} has no such settings. Is the name right? What only some of "
        "the versions have that we allow goes into NOT_EVERYWHERE"
    )
    assert rows.isdisjoint(REASONS)


@pytest.mark.skipif(
    "strict_parametrization_ids" not in known()[0], reason="pytest 9.0 has brought strict ids"
)
@pytest.mark.parametrize("how", ["strict_parametrization_ids = true", "strict = true"])
def test_ids_are_strict_in_files_that_only_the_guest_can_import(folder, how):
    sides = Sides.of(folder, {"test_it.py": ONLY_THERE})
    for ini, status, text in (("", 0, "2 passed"), (how, 1, "Duplicate parametrization IDs")):
        (sides.suite / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
        run = sides.inside(Line.of(""))
        assert run.status == status
        assert text in "\n".join(run.screen)


ONLY_THERE = """
import os, pytest

if "VMSANDBOX_GUEST" not in os.environ:
    raise ImportError("not here")

@pytest.mark.parametrize("a", [1, 1])
def test_a(a): pass
"""


def test_the_run_ends_with_the_limit_of_faulthandler(folder):
    """Plain pytest is gone then; inside, the test is an error, and the next one runs."""
    if "faulthandler_exit_on_timeout" not in known()[0]:
        pytest.skip("pytest 9.0 has brought it")
    test = "import time\n\ndef test_hangs(): time.sleep(90)\n\ndef test_next(): pass\n"
    ini = "[pytest]\nfaulthandler_timeout = 0.5\nfaulthandler_exit_on_timeout = true\n"
    sides = Sides.of(folder, {"pytest.ini": ini, "test_it.py": test})
    assert sides.plain(Line.of("")).status == 1
    run = sides.inside(Line.of(""))
    assert run.status == 1
    assert "the interpreter ended with status 1" in "\n".join(run.screen)
    assert "=== 1 failed, 1 passed in N.NNs ===" in run.screen


# -- values of every type, by every way to set them -------------------------------------------------

VALUES_CONFTEST = """
import os, pathlib, sys

import pytest

TYPES = ["string", "bool", "int", "float", "args", "linelist", "paths", "pathlist"]
KEYS = [f"of_{it}" for it in TYPES] + ["of_nothing", "computed", "unset"]
OWN = ["log_level", "log_auto_indent", "truncation_limit_lines", "verbosity_assertions",
       "python_files", "xfail_strict", "markers", "filterwarnings"]

def pytest_addoption(parser):
    for name in TYPES:
        parser.addini(f"of_{name}", "a key of that type", type=name)
    parser.addini("of_nothing", "without a type", default=None)
    parser.addini("computed", "depends on where it is", default=f"process {os.getpid()}")
    parser.addini("unset", "a list", type="linelist", default=[f"process {os.getpid()}"])
    parser.addoption("--place", type=pathlib.Path)
    parser.addoption("--level", type=float, action="append")
    if hasattr(parser, "_ini_aliases"):  # pytest 9
        parser.addini("of_new", "a key with another name", type="linelist", aliases=["of_old"])
        KEYS.extend(["of_new", "of_old"])
    else:
        parser.addini("of_old", "without aliases", type="linelist")

def pytest_configure(config):
    config.addinivalue_line("unset", "a line that a plugin adds")

@pytest.fixture
def values(pytestconfig):
    lines = [f"{it} = {pytestconfig.getini(it)!r}" for it in KEYS + OWN[:-2]]
    lines += [f"{it}: {getattr(pytestconfig.option, it)!r}" for it in ("place", "level")]
    return "\\n".join(lines).replace(f"process {os.getpid()}", "this process")
"""
INI = {
    "of_string": " a = 'b'  # %d $HOME ",
    "of_bool": "yes",
    "of_int": "-7",
    "of_float": "1e3",
    "of_args": "one 'two words' \"it's\"",
    "of_linelist": "\n    a line\n    another = 'one'\n",
    "of_paths": "data /etc ../outside",
    "of_pathlist": "data /etc",
    "of_nothing": "text",
    "of_old": "\n    an alias",
    "log_level": "10",
    "log_auto_indent": "on",
    "truncation_limit_lines": "5",
    "verbosity_assertions": "2",
    "python_files": "test_*.py check_*.py",
    "xfail_strict": "true",
}
LISTS = {
    "of_args": ["one", "two words", "", " a\n line "],
    "of_linelist": ["one", "  two words", "", "a\nb", "'c"],
    "of_paths": ["data", "/etc", "a b"],
    "of_pathlist": ["data", "/etc"],
    "of_old": ["an alias", "  of it"],
    "python_files": ["test_*.py", "check_*.py"],
}
TYPED = {
    "of_string": " 5 ",
    "of_bool": True,
    "of_int": -7,
    "of_float": 2.5,
    "of_nothing": "",
    "log_level": 10,
    "log_auto_indent": True,
    "truncation_limit_lines": "5",
    "verbosity_assertions": 2,
    "xfail_strict": False,
}


def toml(table, values):
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join([f"[{table}]", *lines, ""])


def ini_text(values):
    return "\n".join(["[pytest]", *(f"{key} = {value}" for key, value in values.items())])


WAYS = {
    "ini": {"pytest.ini": ini_text(INI)},
    "toml, as ini": {"pyproject.toml": toml("tool.pytest.ini_options", INI | LISTS)},
    "toml": {"pyproject.toml": toml("tool.pytest", TYPED | LISTS)},
    "command line": {"pytest.ini": "[pytest]\n"},
    "nothing": {"pytest.ini": "[pytest]\n"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_reads_the_same_values(folder, way):
    if way == "toml" and "strict" not in known()[0]:
        pytest.skip("pytest 9.0 has brought types in TOML")
    test = "def test_values(values): raise ValueError(values)\n"
    sides = Sides.of(folder, {"conftest.py": VALUES_CONFTEST, "test_values.py": test, **WAYS[way]})
    args = ["--place=a place", "--level=1.5", "--level=2"]
    if way == "command line":
        args += [word for key, value in INI.items() for word in ("-o", f"{key}={value}")]
    line = Line(tuple(args))
    expected = sides.plain(line)
    assert fidelity.differences(sides.inside(line), expected) == []
    text = "\n".join(expected.cases)
    assert "computed = 'this process'" in text
    assert ("of_bool = False" in text) == (way == "nothing")


# -- pytest's own plugins -----------------------------------------------------------------------------

OFF = {
    "test_it.py": """
import os, sys, threading, unittest, warnings

import pytest

PLUGINS = %r

def test_plugins(pytestconfig):
    there = [it for it in PLUGINS if pytestconfig.pluginmanager.has_plugin(it)]
    raise ValueError("there are\\n%%s" %% there)

@pytest.mark.parametrize("name", ["cache", "caplog", "capfd", "capsys", "doctest_namespace", "monkeypatch",
                                  "record_property", "recwarn", "subtests", "tmpdir", "tmp_path"])
def test_fixtures(request, name):
    request.getfixturevalue(name)

def test_options(pytestconfig):
    there = [it for it in %r if hasattr(pytestconfig.option, it)]
    raise ValueError("there are\\n%%s" %% there)

def test_compares(): assert [1] == [2]
def test_prints(): print("printed"); assert 0

@pytest.mark.skipif(True, reason="here")
def test_skips(): assert 0

@pytest.mark.xfail
def test_xfails(): assert 0

def test_warns(): warnings.warn("a warning")

def test_thread():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

class TestIt(unittest.TestCase):
    def test_a(self): self.assertEqual(1, 2)
    @unittest.skip("no")
    def test_b(self): pass
""",
    "test_text.txt": ">>> 1\n2\n",
}  # fmt: skip
PLUGINS = [it for it in default_plugins if it not in essential_plugins]
# It decides no outcome, and reports need it on their way.
STAYS = {"reports"}
OPTIONS = ["assertmode", "capture", "doctestmodules", "log_level", "lf", "runxfail", "stepwise",
           "tbstyle", "usepdb", "verbose", "xmlpath", "pastebin", "setupshow"]  # fmt: skip


def with_every_plugin(folder, **files):
    test = OFF["test_it.py"] % ([it for it in PLUGINS if it not in STAYS], OPTIONS)
    return Sides.of(folder, {**OFF, "pytest.ini": "[pytest]\n", "test_it.py": test, **files})


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_of_pytests_is_off(folder, plugin):
    sides = with_every_plugin(folder)
    line = Line.of(f"-p no:{plugin}", ordered=plugin != "capture")
    expected = sides.plain(line)
    assert expected.cases or plugin == "junitxml"
    assert expected.screen or plugin == "terminal"
    assert fidelity.differences(sides.inside(line), expected) == []


BLOCKED = "-p no:assertion -p no:skipping -p no:legacypath -p no:logging"


@pytest.mark.parametrize(
    ("ini", "environment"),
    [
        (f"addopts = {BLOCKED}", {}),
        ("", {"PYTEST_ADDOPTS": BLOCKED}),
        (f"addopts = {BLOCKED} -p extra", {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        (f"addopts = {BLOCKED}", {"PYTEST_PLUGINS": "extra"}),
    ],
    ids=["ini", "environment", "no others", "others"],
)
def test_plugins_are_off_by_other_ways(folder, ini, environment):
    extra = "import pytest\n\n@pytest.fixture(autouse=True)\ndef extra(): print('of a plugin')\n"
    sides = with_every_plugin(folder, **{"pytest.ini": f"[pytest]\n{ini}\n", "extra.py": extra})
    # What stays on this side has its names there, too, if it is to be loaded by name.
    more = ("pytest_vmsandbox.plugin", "xdist.plugin", "pytest_timeout", "pytest_cov")
    alone = "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in environment
    named = [word for it in more if alone for word in ("-p", it)]
    line = Line.of("", **environment)
    inside = sides.run("inside", line, *named, *INSIDE)
    expected = sides.plain(line)
    assert fidelity.differences(sides.reader.read(inside), expected) == []
    assert ("of a plugin" in "\n".join(expected.cases)) == ("extra" in str((ini, environment)))
