"""Checks the reports that a guest sends, and makes pytest's reports from them.

A guest is not trusted. We accept only the right shape, and look up only a few things by name. Texts
lose what could deceive you on a terminal, but keep their colours.
"""

from __future__ import annotations

import builtins
import logging
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from _pytest._code.code import TerminalRepr
from _pytest._io import TerminalWriter

from pytest_vmsandbox.inside.wire import Message, broken

PHASES = ("setup", "call", "teardown")
OUTCOMES = ("passed", "failed", "skipped")
# The outcomes of attempts that pytest-rerunfailures and pytest-retry repeat.
RERUN, RETRIED = "rerun", "retried"
_SUBTEST = "SubTestReport"  # the name in pytest since 9.0, and in pytest-subtests
_MAX_SECTIONS, _MAX_PROPERTIES, _MAX_ENTRIES = 1_000, 10_000, 10_000
_MAX_ATTRIBUTES = 100
_MAX_SOURCE = 200_000  # characters in a report for pytest to highlight, which can take seconds
# Control characters and sequences, except colours, tabs and line ends; characters that change the
# order of a line on a terminal; lone surrogates, which cannot be written.
_TRICKS = re.compile(
    r"\x1b(?!\[[0-9;]*m)(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])?"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_RETURN = re.compile(r"\r(?!\n)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FAILURE = "E   "  # starts the first line of an entry that is no source


def harmless(text: object) -> str:
    r"""A text without anything that could deceive you on a terminal. Colours stay.

    A carriage return, with which a line could be overwritten, becomes a line end.

    Example:
        >>> harmless("\x1b[31mred\x1b[0m\x1b[2J")
        '\x1b[31mred\x1b[0m'
    """
    if not isinstance(text, str):
        raise broken("expected a text", text)
    return _RETURN.sub("\n", _TRICKS.sub("", text))


def colourless(text: object) -> str:
    """A harmless text without colours, for texts that pytest cuts, wraps or highlights."""
    return _COLOUR.sub("", harmless(text))


class ReportReader:
    """Makes reports from what a guest sends.

    Args:
        there, here: the project's folder in the guest, and on this machine.
        outside: folders outside of it: path here → path there.
        outcomes: further outcomes of tests that plugins of this side know.
    """

    def __init__(
        self, there: str, here: Path, outside: Mapping[str, str], outcomes: Collection[str] = ()
    ) -> None:
        self._outcomes = (*OUTCOMES, *outcomes)
        self._here = {there.rstrip("/"): str(here)}
        self._here |= {theirs: ours for ours, theirs in outside.items()}
        names = "|".join(map(re.escape, self._here))
        self._mention = re.compile(rf"({names})(?![\w-]|\.\w)")

    def test_report(self, item: pytest.Item, nodeid: str, data: object) -> pytest.TestReport:
        """The report of a phase of `item`, which is called `nodeid` in the guest.

        Raises:
            GuestLost: `data` is no report, or the report of another test.
        """
        fields = _object(data)
        if fields.get("nodeid") != nodeid:
            raise broken("it sent a report of another test", fields.get("nodeid"))
        clean: dict[str, Any] = {
            "nodeid": item.nodeid,
            "location": item.location,
            "keywords": dict.fromkeys(item.keywords, 1),
            "outcome": _one_of(fields.get("outcome"), self._outcomes),
            "when": _one_of(fields.get("when"), PHASES),
            "longrepr": self._longrepr(fields.get("longrepr")),
            "sections": _pairs(fields.get("sections"), _MAX_SECTIONS),
            "user_properties": _rows(
                fields.get("user_properties"), _MAX_PROPERTIES, harmless, _plain
            ),
            **{name: _number(fields.get(name, 0)) for name in ("duration", "start", "stop")},
        }
        if "wasxfail" in fields:
            clean["wasxfail"] = colourless(fields["wasxfail"])
        elif clean["outcome"] == "skipped" and not isinstance(clean["longrepr"], tuple):
            raise broken("it sent a skipped test without a reason", fields.get("longrepr"))
        if clean["outcome"] == "failed" and clean["longrepr"] is None:
            clean["longrepr"] = ""  # pytest's own code relies on one
        if fields.get("_report_type") == _SUBTEST:
            if clean["when"] != "call":
                raise broken("it sent a subtest outside of a test's call", clean["when"])
            report = self._subtest(item, clean, _context(fields.get(_CONTEXT)))
        else:
            report = _made(pytest.TestReport._from_json, clean)  # noqa: SLF001  # xdist's way, too
        attributes = _object(fields.get("attributes", {}))
        self._hang(report, attributes)
        if RERUN in self._outcomes and RERUN in attributes:  # the number of earlier attempts
            vars(report)[RERUN] = _integer(attributes[RERUN])
        return report

    def _hang(self, report: pytest.TestReport, attributes: dict[str, Any]) -> None:
        """Give a report the attributes that plugins gave it in the guest.

        They replace no attribute of the report, and none that pytest looks for.
        """
        if len(attributes) > _MAX_ATTRIBUTES:
            raise broken(f"it sent a report with more than {_MAX_ATTRIBUTES} attributes")
        for name, value in attributes.items():
            if _is_free(report, name):
                clean = self.value(value)
                setattr(report, name, _extras(clean) if name in _OF_HTML else clean)

    def value(self, value: object) -> Any:
        """A JSON value with harmless texts, in which paths of the project are those of this machine."""
        return _plain(value, self._local)

    def is_subtest(self, data: object) -> bool:
        """Whether a report comes beside those of a test's phases: for a subtest, or a retried call."""
        fields = _object(data)
        return fields.get("_report_type") == _SUBTEST or fields.get("outcome") == RETRIED

    def _subtest(
        self, item: pytest.Item, clean: dict[str, Any], context: dict[str, Any]
    ) -> pytest.TestReport:
        def make(data: dict[str, Any]) -> Any:
            return item.config.hook.pytest_report_from_serializable(config=item.config, data=data)

        more = {"_report_type": _SUBTEST, _CONTEXT: context, "$report_type": "TestReport"}
        report: pytest.TestReport = _made(make, {**clean, **more})
        if hasattr(report, "context"):  # pytest in the guest has already taken the repr of these
            object.__setattr__(report.context, "kwargs", context["kwargs"])
        return report

    def collect_failure(self, data: object) -> Any:
        """Why a file could not be collected, as a value for `pytest.CollectReport.longrepr`.

        Raises:
            GuestLost: `data` is no report.
        """
        fields = _object(data)
        clean = {
            "nodeid": "",
            "outcome": _one_of(fields.get("outcome"), OUTCOMES),
            "longrepr": self._longrepr(fields.get("longrepr")),
            "result": None,
            "sections": _pairs(fields.get("sections"), _MAX_SECTIONS),
        }
        made = _made(pytest.CollectReport._from_json, clean)  # noqa: SLF001
        return "" if made.longrepr is None else made.longrepr

    def path(self, path: object) -> str:
        """A path, or a text that pytest cuts. Paths of the project are those of this machine."""
        return self.text(colourless(path))

    def text(self, text: str) -> str:
        """A text in which paths of the project are those of this machine."""
        return self._mention.sub(lambda found: self._here[found[1]], text)

    def _local(self, text: object) -> str:
        return self.text(harmless(text))

    def _longrepr(self, value: object) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            return self._local(value)
        if isinstance(value, list):
            return _row(value, self.path, _integer, self.path)
        fields = _object(value)
        if "text" in fields:
            return _Text(self._local(fields["text"]))
        sections, chain = fields.get("sections"), fields.get("chain")
        clean: dict[str, Any] = {
            "reprcrash": self._crash(fields.get("reprcrash")),
            "reprtraceback": self._traceback(fields.get("reprtraceback")),
            "sections": _rows(sections, _MAX_SECTIONS, harmless, harmless, _separator),
            "chain": chain and _rows(chain, _MAX_ENTRIES, self._traceback, self._crash, _optional),
        }
        traces = [clean["reprtraceback"], *(trace for trace, _, _ in clean["chain"] or ())]
        entries = [entry["data"] for trace in traces for entry in trace["reprentries"]]
        if sum(len(line) for entry in entries for line in _source(entry["lines"])) > _MAX_SOURCE:
            for entry in entries:
                entry["style"] = "value"
        return clean

    def _crash(self, value: object) -> dict[str, Any] | None:
        if value is None:
            return None
        return _checked(value, path=self.path, lineno=_integer, message=self.path)

    def _traceback(self, value: object) -> dict[str, Any]:
        return _checked(value, reprentries=self._entries, extraline=_optional, style=harmless)

    def _entries(self, value: object) -> list[dict[str, Any]]:
        return [self._entry(entry) for entry in _list(value, _MAX_ENTRIES)]

    def _entry(self, value: object) -> dict[str, Any]:
        fields = _object(value)
        kind, data = fields.get("type"), _object(fields.get("data"))
        lines = [self._local(line) for line in _list(data.get("lines"), _MAX_ENTRIES * 10)]
        clean: dict[str, Any] = {"lines": lines, "style": harmless(data.get("style", "long"))}
        if kind == "ReprEntry":
            if clean["style"] != "value":  # pytest highlights what is source
                source = _source(lines)
                lines[: len(source)] = map(colourless, source)
            arguments, local = data.get("reprfuncargs"), data.get("reprlocals")
            clean["reprfuncargs"] = arguments and _checked(arguments, args=_pairs)
            clean["reprlocals"] = local and _checked(local, lines=_lines)
            clean["reprfileloc"] = self._crash(data.get("reprfileloc"))
        elif kind != "ReprEntryNative":
            raise broken("it sent an unknown kind of entry in a traceback", kind)
        return {"type": kind, "data": clean}


class _Text(TerminalRepr):
    """A reason that is only a text. Unlike for a `str`, pytest makes no summary of it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write it; see pytest."""
        for line in self._text.splitlines():
            tw.line(line)


def recorded_warning(message: Message, reader: ReportReader) -> dict[str, Any]:
    """The arguments of ``pytest_warning_recorded`` for a warning from a guest.

    Raises:
        GuestLost: the message is no warning.
    """
    category = _category(*_row(message.get("category"), harmless, harmless))
    location = message.get("location")
    return {
        "warning_message": warnings.WarningMessage(
            message=category(reader.text(harmless(message.get("warning")))),
            category=category,
            filename=reader.path(message.get("file")),
            lineno=_integer(message.get("line")),
            line=harmless(message.get("source", "")),  # or it is read from a file of this machine
        ),
        "when": _one_of(message.get("when"), ("config", "collect", "runtest")),
        "nodeid": harmless(message.get("node")),
        "location": None if location is None else _row(location, reader.path, _integer, harmless),
    }


def log_record(value: object, reader: ReportReader) -> logging.LogRecord:
    """A record of `logging` from a guest. Its message is already formatted.

    Raises:
        GuestLost: `value` is no record.
    """
    path = Path(reader.path(_object(value).get("pathname")))
    place = {"pathname": str(path), "filename": path.name, "module": path.stem}
    return logging.makeLogRecord({**_checked(value, **_RECORD), **place})


def _category(module: str, name: str) -> type[Warning]:
    """A class with that name. Nothing is imported because a guest says so."""
    known = getattr({"builtins": builtins, "pytest": pytest}.get(module), name, None)
    if isinstance(known, type) and issubclass(known, Warning):
        return known
    name = name if name.isidentifier() else "Warning"
    return type(name, (Warning,), {"__module__": module[:200]})


# Names that a guest may not give to attributes of a report, besides those that it has: pytest, xdist or
# plugins for reruns use them.
_TAKEN = {
    *dir(pytest.CollectReport), "_id", "_report_type", "cls", "context", "id", "item_index", "node",
    "rerun", "result", "self", "testrun_uid", "wasxfail", "worker_id",
}  # fmt: skip


def _is_free(report: pytest.TestReport, name: str) -> bool:
    """Whether a guest may use the name for an attribute. Names that begin with ``vm_`` are ours."""
    if not name.isidentifier() or name.startswith(("__", "vm_")):
        return False
    return name not in _TAKEN and not hasattr(report, name)


def _extras(value: object) -> list[dict[str, Any]]:
    """The valid extras of pytest-html. It writes files for them, whose names end with `extension`."""
    return [extra for extra in value if _is_extra(extra)] if isinstance(value, list) else []


def _is_extra(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() >= _EXTRA:
        return False
    kind, content, extension = (value[field] for field in ("format_type", "content", "extension"))
    if kind not in _EXTRAS or not (isinstance(content, str) or kind == "json"):
        return False
    return extension is None or (
        isinstance(extension, str) and _EXTENSION.fullmatch(extension) is not None
    )


_EXTRA = {"name", "format_type", "content", "mime_type", "extension"}
_EXTRAS = ("html", "image", "json", "text", "url", "video")
_EXTENSION = re.compile(r"[\w.+-]{0,20}", re.ASCII)
_OF_HTML = ("extras", "extra")  # attributes for pytest-html, which writes files for them

_CONTEXT = "_subtest.context"


def _context(value: object) -> dict[str, Any]:
    fields = _object(value)
    message = fields.get("msg")
    return {
        "msg": None if message is None else colourless(message),
        "kwargs": {
            colourless(name): _plain(content, colourless)
            for name, content in _object(fields.get("kwargs")).items()
            if isinstance(content, str | int | float | bool | None)
        },
    }


def _made(make: Callable[[dict[str, Any]], Any], data: dict[str, Any]) -> Any:
    """A report of pytest, made by pytest's own code, which may refuse the data."""
    longrepr = data["longrepr"]
    plain = not isinstance(longrepr, dict)
    try:  # pytest mistakes a text with certain words in it for a traceback
        report = make({**data, "longrepr": None} if plain else data)
    except Exception as error:
        raise broken("it sent a report that pytest does not accept") from error
    if plain:
        report.longrepr = longrepr
    return report


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise broken("expected an object", value)
    return value


def _checked(value: object, **checks: Callable[[Any], Any]) -> dict[str, Any]:
    """The fields of an object, each converted by its check."""
    fields = _object(value)
    return {name: check(fields.get(name)) for name, check in checks.items()}


def _list(value: object, most: int, least: int = 0) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise broken("expected a list, or a list of another length", value)
    return value


def _row(value: object, *checks: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The members of a list, each converted by its check."""
    cells = _list(value, len(checks), len(checks))
    return tuple(check(cell) for check, cell in zip(checks, cells, strict=True))


def _rows(value: object, most: int, *checks: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
    return [_row(row, *checks) for row in _list(value, most)]


def _pairs(value: object, most: int = _MAX_ENTRIES) -> list[tuple[Any, ...]]:
    return _rows(value, most, harmless, harmless)


def _lines(value: object) -> list[str]:
    return [harmless(line) for line in _list(value, _MAX_ENTRIES)]


def _optional(text: object) -> str | None:
    return None if text is None else harmless(text)


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise broken("expected the number of a line", value)
    return value


def _number(value: object, limit: float = 1e12) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < limit:
        raise broken("expected a number", value)
    return float(value) if math.isfinite(value) else 0.0


def _one_of(value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise broken(f"expected one of {', '.join(allowed)}", value)
    return value


def _source(lines: list[str]) -> list[str]:
    return list(takewhile(lambda line: not line.startswith(_FAILURE), lines))


def _separator(value: object) -> str:
    text = harmless(value)[:1]
    return text if text.isprintable() and text else "-"


def _plain(value: object, text: Callable[[str], str] = harmless) -> Any:
    """Any JSON value with harmless texts. Numbers that xdist cannot send become texts."""
    if isinstance(value, dict):
        return {harmless(name): _plain(member, text) for name, member in value.items()}
    if isinstance(value, list):
        return [_plain(member, text) for member in value]
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int) and not -(2**31) <= value < 2**63:
        return str(value)
    return value


def _identity(value: object) -> int:
    """The number of a process or a thread; 0 without one."""
    return int(_number(value or 0, 1e20))


# The fields of a record of `logging`, without its place.
_RECORD: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("name", "levelname", "msg"), harmless),
    **dict.fromkeys(("funcName", "processName", "threadName", "taskName"), _optional),
    **dict.fromkeys(("exc_text", "stack_info"), _optional),
    **dict.fromkeys(("levelno", "lineno"), _integer),
    **dict.fromkeys(("created", "msecs"), _number),
    **dict.fromkeys(("process", "thread"), _identity),
}
