"""Reports that come from a guest: pytest's own go through, and nothing else does harm."""

import copy
import logging
import warnings
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from pytest_vmsandbox.core.errors import GuestLost
from pytest_vmsandbox.plugin.in_vm.remote_reports import harmless, log_record, recorded_warning
from support.reports import (
    COLOUR,
    EVIL,
    EVIL_TEXT,
    HERE,
    JSON,
    SHADOWS,
    THERE,
    Host,
    check_text,
    dumps,
    nearly_right,
    samples,
    sent,
)

NODE = "tests/test_x.py::test_x"
slow = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=30)


@pytest.fixture(scope="module")
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture
def read(host):
    def read(data):
        return host.reader.test_report(host.item(NODE), data["nodeid"], sent(data))

    return read


def sample(**wanted):
    """A report of pytest's own that has certain fields."""
    for _, _, data in samples():
        if all(data.get(name) == value for name, value in wanted.items()):
            return copy.deepcopy(data)
    raise AssertionError(wanted)


def plain(**fields):
    return {
        "nodeid": NODE,
        "outcome": "passed",
        "when": "call",
        "longrepr": None,
        "sections": [],
        "user_properties": [],
        **fields,
    }


def failure(**fields):
    """A failure with a traceback, which can be changed."""
    data = next(
        copy.deepcopy(data)
        for _, _, data in samples()
        if data["outcome"] == "failed"
        and data["when"] == "call"
        and "reprtraceback" in data["longrepr"]
        and any(it["data"].get("reprfuncargs") for it in entries(data))
    )
    return {**data, **fields}


def entries(data):
    return data["longrepr"]["reprtraceback"]["reprentries"]


class TestRealReports:
    def test_there_are_all_kinds(self):
        kinds = {
            (data["outcome"], data["when"], type(data["longrepr"]).__name__, "wasxfail" in data)
            for _, _, data in samples()
        }
        assert kinds >= {
            ("passed", "setup", "NoneType", False),
            ("passed", "call", "NoneType", True),
            ("failed", "call", "dict", False),
            ("failed", "call", "str", False),
            ("failed", "setup", "dict", False),
            ("failed", "teardown", "dict", False),
            ("skipped", "setup", "list", False),
            ("skipped", "call", "list", False),
            ("skipped", "call", "dict", True),
        }
        assert any("_subtest.context" in it for _, _, it in samples()) or pytest.version_tuple < (
            9,
        )

    def test_they_go_through_unchanged(self, host):
        for head, text, data in samples():
            report = host.reader.test_report(host.item(NODE), data["nodeid"], sent(data))
            assert report.longreprtext == text
            assert [report.outcome, report.when] == [data["outcome"], data["when"]]
            assert [list(it) for it in report.sections] == data["sections"]
            assert [list(it) for it in report.user_properties] == data["user_properties"]
            assert report.duration == data["duration"]
            assert getattr(report, "wasxfail", None) == data.get("wasxfail")
            if "_subtest.context" in data:
                assert report.head_line == head.replace("test_subtests", "test_x")

    def test_they_can_be_shown(self, host):
        for _, _, data in samples()[::3]:
            host.check(host.reader.test_report(host.item(NODE), data["nodeid"], sent(data)))

    def test_who_and_where_is_this_sides(self, read):
        data = sample(outcome="passed", when="call")
        report = read({**data, "location": ["/etc", 1, "\x1b[2J"], "keywords": {"evil": 1}})
        assert report.nodeid == NODE
        assert report.location == ("tests/test_x.py", 3, "test_x")
        assert report.keywords == {"test_x": 1}

    def test_a_path_of_the_project_is_the_one_here(self, read):
        data = failure()
        data["longrepr"]["reprcrash"]["path"] = f"{THERE}/tests/test_x.py"
        for trace, crash, _ in data["longrepr"]["chain"]:
            crash["path"] = f"{THERE}/x.py"
            for entry in trace["reprentries"]:
                entry["data"]["reprfileloc"]["path"] = f"{THERE}/tests/test_x.py"
        text = read(data).longreprtext
        assert f"{HERE}/tests/test_x.py:" in text
        assert THERE not in text


class TestBrokenReports:
    @slow
    @given(st.data())
    def test_one_that_is_nearly_right(self, host, data):
        report = data.draw(nearly_right())
        try:
            made = host.reader.test_report(host.item(NODE), report.get("nodeid"), sent(report))
        except GuestLost as lost:
            check_text(str(lost))
        else:
            host.check(made)

    @slow
    @given(JSON)
    def test_anything(self, host, value):
        for use in (
            lambda: host.reader.test_report(host.item(NODE), "x", sent(value)),
            lambda: host.reader.collect_failure(sent(value)),
        ):
            with pytest.raises(GuestLost) as caught:
                use()
            check_text(str(caught.value))

    @slow
    @given(nearly_right())
    def test_why_a_file_was_not_collected(self, host, report):
        try:
            made = host.reader.collect_failure(sent(report))
        except GuestLost:
            return
        assert made is not None
        check_text(str(made))

    def test_another_tests(self, host):
        with pytest.raises(GuestLost, match="a report of another test"):
            host.reader.test_report(host.item(NODE), NODE, plain(nodeid="other"))

    @pytest.mark.parametrize("name", SHADOWS)
    @pytest.mark.parametrize("value", ["x", None, 1, {"msg": None, "kwargs": {}}])
    def test_a_key_that_would_shadow(self, host, read, name, value):
        """Beside a report's own fields, no key of what is sent counts but that for attributes."""
        for data in (plain(), failure()):
            try:
                report = read({**data, name: value} if name != "nodeid" else data)
            except GuestLost:
                continue
            host.check(report)
            taken = {"wasxfail", "longrepr", "context", "_report_type", "_id", "nodeid"}
            assert name not in vars(report) or name in taken

    @pytest.mark.parametrize("value", ["x", None, 1, {"msg": None, "kwargs": {}}])
    def test_attributes_that_would_shadow(self, host, read, value):
        """They replace nothing that a report has, or that pytest or xdist look for on one."""
        names = {*SHADOWS} - {"url", "chain", "reprcrash", "reprtraceback"}
        names |= {it for it in dir(pytest.TestReport) if it.startswith("__")}
        for data in (plain(), failure()):
            known = read(data)
            taken = dict.fromkeys(names | vars(known).keys(), value)
            report = read({**data, "attributes": {**taken, "free": 1}})
            host.check(report)
            assert vars(report).keys() - vars(known).keys() == {"free"}
            assert report.longreprtext == known.longreprtext
            for name in vars(known).keys() - {"longrepr"}:
                assert vars(report)[name] == vars(known)[name]

    @pytest.mark.parametrize(
        "change",
        [
            {"outcome": "rerun"},
            {"outcome": ["passed"]},
            {"when": "collect"},
            {"when": None},
            {"longrepr": 3},
            {"longrepr": []},
            {"longrepr": ["a", 1]},
            {"longrepr": ["a", "1", "b"]},
            {"longrepr": {}},
            {"outcome": "skipped"},
            {"outcome": "skipped", "longrepr": "why"},
            {"wasxfail": 3},
            {"sections": [["a"]]},
            {"sections": [["a", 3]]},
            {"sections": {"a": "b"}},
            {"sections": [["a", "b"]] * 1_001},
            {"user_properties": [[1, 2]]},
            {"user_properties": [["a", 1]] * 10_001},
            {"duration": "1"},
            {"duration": True},
            {"duration": 10**300},
            {"start": None},
            {"attributes": ["a"]},
            {"attributes": None},
            {"attributes": dict.fromkeys(map("a{}".format, range(101)))},
            {"_report_type": "SubTestReport"},
            {"_report_type": "SubTestReport", "_subtest.context": {"msg": 3, "kwargs": {}}},
            {
                "_report_type": "SubTestReport",
                "_subtest.context": {"msg": "x", "kwargs": {}},
                "when": "teardown",
            },
        ],
    )
    def test_a_field_that_is_wrong(self, read, change):
        with pytest.raises(GuestLost):
            read(plain(**change))

    @pytest.mark.parametrize("lineno", [2**31, -(2**31), 10**399, 1.5, "1", None, True])
    def test_a_line_number_that_is_none(self, read, lineno):
        data = failure()
        data["longrepr"]["chain"][-1][1]["lineno"] = lineno
        with pytest.raises(GuestLost):
            read(data)

    @pytest.mark.parametrize("kind", ["ReprEntryNative2", "toterminal", None, ["ReprEntry"]])
    def test_an_entry_of_an_unknown_kind(self, read, kind):
        data = failure()
        data["longrepr"]["chain"][0][0]["reprentries"][0]["type"] = kind
        with pytest.raises(GuestLost):
            read(data)

    def test_a_failure_without_a_reason_has_an_empty_one(self, host, read):
        report = read(plain(outcome="failed"))
        assert report.longrepr == ""
        host.check(report)

    def test_a_reason_of_words_that_pytest_looks_for(self, host, read):
        text = "reprcrash, reprtraceback"
        report = read(plain(outcome="failed", longrepr=text))
        assert report.longrepr == text
        host.check(report)
        assert host.reader.collect_failure(plain(outcome="failed", longrepr=text)) == text

    @pytest.mark.parametrize("separator", ["\x1b[31m", "\n", "\t", "", "ab", "\u202e", "\x1b[2J"])
    def test_a_separator_is_one_visible_character(self, host, read, separator):
        data = failure()
        data["longrepr"]["sections"] = [["[2J", "[2J", separator]]
        report = read(data)
        (section,) = report.longrepr.sections
        assert section[2] in {"-", "a"}
        host.check(report)

    def test_a_property_is_clean_to_its_depth(self, host, read):
        value = [{"\x1b[2J": ["\ud800", {"a": "\x9b2J"}]}, 10**399, -(2**40), None, 1.5]
        report = read(plain(user_properties=[["a\x07", value]]))
        assert report.user_properties == [
            ("a", [{"": ["", {"a": "2J"}]}, str(10**399), str(-(2**40)), None, 1.5])
        ]  # fmt: skip
        host.check(report)
        dumps(report.user_properties)

    @pytest.mark.parametrize("name", ["", "a b", "1a", "a.b", "\x1b[2J", "a\n", "\ud800", "a-b"])
    def test_an_attribute_has_a_name_that_can_be_written(self, read, name):
        assert vars(read(plain(attributes={name: 1}))).keys() == vars(read(plain())).keys()

    def test_an_attribute_is_clean_to_its_depth(self, host, read):
        value = {"\x1b[2Ja": ["\ud800", f"{THERE}/a", {"a": "\x9b2J"}], "n": [10**399, 2**40, 1.5]}
        report = read(plain(attributes={"mine": value, "_none": None}))
        assert report.mine == {"a": ["", f"{HERE}/a", {"a": "2J"}], "n": [str(10**399), 2**40, 1.5]}
        assert report._none is None
        host.check(report)

    @pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest 9.0 has brought subtests")
    def test_a_subtest_has_attributes_too(self, read):
        data = next(copy.deepcopy(it) for _, _, it in samples() if "_subtest.context" in it)
        report = read(
            {**data, "attributes": {"mine": [1], "context": 1, "_sub_test_description": 1}}
        )
        assert report.mine == [1]
        assert report.head_line == read(data).head_line

    @pytest.mark.parametrize(
        ("change", "stays"),
        [
            ({}, True),
            ({"extension": None}, True),
            ({"extension": "/" * 250 + "etc/x"}, False),
            ({"extension": "x/../../y"}, False),
            ({"extension": "x" * 30}, False),
            ({"extension": ["txt"]}, False),
            ({"format_type": "other"}, False),
            ({"format_type": []}, False),
            ({"content": 3}, False),
            ({"content": [3], "format_type": "json"}, True),
        ],
    )
    def test_pytest_html_writes_no_file_of_a_guests_choice(self, read, change, stays):
        extra = {
            "name": "a", "format_type": "text", "content": "b", "mime_type": "text/plain",
            "extension": "txt", **change,
        }  # fmt: skip
        report = read(plain(attributes={"extras": [extra, {}, 3, None], "extra": {"a": "b"}}))
        assert report.extras == ([extra] if stays else [])
        assert report.extra == []

    def test_a_traceback_of_source_that_is_long(self, host, read):
        """To highlight it would take minutes."""
        data = failure()
        lines = data["longrepr"]["chain"][0][0]["reprentries"][0]["data"]["lines"]
        lines[:0] = ["(" * 100] * 30_000
        assert "(" * 100 in host.shown(read(data), markup=True, verbose=0)

    def test_colours_stay_where_pytest_does_not_cut(self, host, read):
        red = "\x1b[31mred\x1b[0m"
        data = failure(sections=[[red, red]])
        entry = data["longrepr"]["chain"][-1][0]["reprentries"][-1]["data"]
        entry["lines"] = [f"    {red}", f"E   {red}"]
        report = read(data)
        assert report.sections == [(red, red)]
        assert report.longrepr.chain[-1][0].reprentries[-1].lines == ["    red", f"E   {red}"]
        host.check(report)


class TestHarmless:
    @given(EVIL_TEXT | st.text() | st.text("\x1b[]0;m\\\r\n\x07\x9bP_J?", max_size=30))
    @example("\x1b\x1b[2J[2J")
    @example("\x1b[\x1b[0m2J")
    def test_nothing_is_left(self, text):
        clean = harmless(text)
        check_text(clean)
        assert harmless(clean) == clean

    @given(EVIL_TEXT, EVIL_TEXT)
    def test_nothing_comes_about_between_two(self, one, two):
        check_text(harmless(one) + harmless(two))

    @pytest.mark.parametrize("text", EVIL)
    def test_examples(self, text):
        check_text(harmless(text))
        check_text(harmless(f"a{text}b\x1b[0mc{text}"))

    @given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs"])))
    def test_other_text_stays(self, text):
        assert harmless(text) == text
        assert harmless(f"\x1b[1;31m{text}\x1b[m\t\r\n") == f"\x1b[1;31m{text}\x1b[m\t\r\n"

    @pytest.mark.parametrize(
        ("text", "clean"),
        [
            ("\x1b[31mred\x1b[0m\x1b[2J", "\x1b[31mred\x1b[0m"),
            ("\x1b]0;title\x07x", "x"),
            ("\x1b]0;title\x1b\\x", "x"),
            ("\x1b[?1049hx", "x"),
            ("10%\r20%\r\n", "10%\n20%\r\n"),
            ("a\u202eb\u2069c\u200e", "abc\u200e"),
            ("\ud83d\ude00", ""),
        ],
    )
    def test_what_becomes_of_it(self, text, clean):
        assert harmless(text) == clean

    @pytest.mark.parametrize(
        "text",
        ["\x1b]" * 100_000, "\x1b[" + "1" * 200_000, "\x1b]" + "x" * 200_000, "\r" * 200_000],
    )
    def test_it_takes_no_long_time(self, text):
        assert not COLOUR.search(harmless(text))

    @pytest.mark.parametrize("value", [None, 3, b"x", ["x"], {}])
    def test_it_has_to_be_a_text(self, value):
        with pytest.raises(GuestLost):
            harmless(value)


class TestRecords:
    RECORD: ClassVar = {
        "name": "a.b", "levelno": 30, "levelname": "WARNING", "pathname": f"{THERE}/tests/test_x.py",
        "lineno": 3, "funcName": "test_x", "created": 1e9, "msecs": 5.0, "process": 3,
        "processName": "MainProcess", "thread": 2**47, "threadName": "MainThread", "taskName": None,
        "stack_info": None, "msg": "50% \x1b[2Jof it", "exc_text": None,
    }  # fmt: skip

    def test_one(self, host):
        record = log_record(self.RECORD, host.reader)
        shown = "%(levelname)s %(name)s %(filename)s:%(lineno)d %(pathname)s %(thread)d %(message)s"
        assert logging.Formatter(shown).format(record) == (
            f"WARNING a.b test_x.py:3 {HERE}/tests/test_x.py {2**47} 50% of it"
        )

    @slow
    @given(st.data())
    def test_anything(self, host, data):
        record = dict(self.RECORD)
        for name in data.draw(st.sets(st.sampled_from(sorted(record)), min_size=1)):
            record[name] = data.draw(JSON)
        try:
            found = log_record(record, host.reader)
        except GuestLost as lost:
            check_text(str(lost))
        else:
            check_text(logging.Formatter("%(asctime)s %(levelname)s %(message)s").format(found))


class TestWarnings:
    MESSAGE: ClassVar = {
        "warning": "careful",
        "category": ["builtins", "UserWarning"],
        "file": f"{THERE}/tests/test_x.py",
        "line": 3,
        "when": "runtest",
        "node": NODE,
        "location": None,
        "source": '    warnings.warn("careful")\n',
    }

    def test_one(self, host):
        found = recorded_warning(self.MESSAGE, host.reader)
        assert found["warning_message"].category is UserWarning
        assert host.warned(found).splitlines()[1:4] == [
            NODE,
            f"  {HERE}/tests/test_x.py:3: UserWarning: careful",
            '    warnings.warn("careful")',
        ]  # fmt: skip

    @pytest.mark.parametrize("file", ["/etc/hostname", "/dev/zero", "/proc/self/environ", __file__])
    def test_no_file_is_read_here(self, host, file):
        message = {**self.MESSAGE, "file": file, "line": 1}
        del message["source"]
        found = recorded_warning(message, host.reader)
        assert host.warned(found).splitlines()[2:4] == [f"  {file}:1: UserWarning: careful", ""]

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("builtins", "open"),
            ("builtins", "Exception"),
            ("os", "system"),
            ("pytest", "exit"),
            ("builtins", "__import__"),
            ("evil", "__class__"),
            ("evil\n\x1b[2J", "not a name"),
            ("x" * 10_000, "x" * 10_000),
        ],
    )
    def test_a_category_is_a_warning(self, host, module, name):
        found = recorded_warning({**self.MESSAGE, "category": [module, name]}, host.reader)
        assert issubclass(found["warning_message"].category, Warning)
        check_text(host.warned(found))

    def test_every_known_category_can_be_made(self, host):
        for module in (__builtins__, vars(pytest)):
            for name, kind in module.items():
                if isinstance(kind, type) and issubclass(kind, Warning):
                    category = ["pytest" if module is vars(pytest) else "builtins", name]
                    with warnings.catch_warnings():
                        warnings.simplefilter("error")
                        found = recorded_warning(
                            {**self.MESSAGE, "category": category}, host.reader
                        )
                    assert found["warning_message"].category is kind

    @slow
    @given(st.data())
    def test_anything(self, host, data):
        message = dict(self.MESSAGE)
        for name in data.draw(st.sets(st.sampled_from(sorted(message)), min_size=1)):
            message[name] = data.draw(JSON)
        try:
            found = recorded_warning(message, host.reader)
        except GuestLost as lost:
            check_text(str(lost))
        else:
            check_text(host.warned(found))
