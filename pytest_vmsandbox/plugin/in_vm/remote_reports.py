"""Reports that come from a guest: checked, and made into pytest's own.

A guest is not trusted, so of what it sends only what has the right shape is taken, and only a few
things by name; texts lose what could play tricks on a terminal, but keep their colours.
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
# The outcomes of what pytest-rerunfailures and pytest-retry try again.
RERUN, RETRIED = "rerun", "retried"
_SUBTEST = "SubTestReport"  # pytest's own since 9.0, and pytest-subtests', call it so
_MAX_SECTIONS, _MAX_PROPERTIES, _MAX_ENTRIES = 1_000, 10_000, 10_000
_MAX_ATTRIBUTES = 100
_MAX_SOURCE = 200_000  # characters in a report that pytest highlights: that can take seconds
# Control characters and sequences, but for colours, tabs and line ends; characters that let a
# terminal show a line in another order; half characters, which cannot be written.
_TRICKS = re.compile(
    r"\x1b(?!\[[0-9;]*m)(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])?"
    r"|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_RETURN = re.compile(r"\r(?!\n)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FAILURE = "E   "  # starts the first of an entry's lines that is no source


def harmless(text: object) -> str:
    r"""A text without what could play tricks on a terminal; colours stay.

    A carriage return, which would let a line be written over, becomes a line end.

    Example:
        >>> harmless("\x1b[31mred\x1b[0m\x1b[2J")
        '\x1b[31mred\x1b[0m'
    """
    if not isinstance(text, str):
        raise broken("something else where a text should be", text)
    return _RETURN.sub("\n", _TRICKS.sub("", text))


def colourless(text: object) -> str:
    """Likewise, for what pytest cuts, wraps or highlights: colours would be cut through."""
    return _COLOUR.sub("", harmless(text))


class ReportReader:
    """Makes reports of what a guest sends.

    Args:
        there, here: the project's folder in the guest, and on this machine.
        outside: folders outside of it: from what each is called here to what it is there.
        outcomes: those of tests that plugins of this side know, besides pytest's.
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
            GuestLost: it is of another test, or no report.
        """
        fields = _object(data)
        if fields.get("nodeid") != nodeid:
            raise broken("a report of a test that was not asked for", fields.get("nodeid"))
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
            raise broken("a skipped test without a reason", fields.get("longrepr"))
        if clean["outcome"] == "failed" and clean["longrepr"] is None:
            clean["longrepr"] = ""  # pytest's own code relies on one
        if fields.get("_report_type") == _SUBTEST:
            if clean["when"] != "call":
                raise broken("a subtest that is no part of a test's call", clean["when"])
            report = self._subtest(item, clean, _context(fields.get(_CONTEXT)))
        else:
            report = _made(pytest.TestReport._from_json, clean)  # noqa: SLF001  # xdist's way, too
        attributes = _object(fields.get("attributes", {}))
        self._hang(report, attributes)
        if RERUN in self._outcomes and RERUN in attributes:  # how many attempts there were before
            vars(report)[RERUN] = _integer(attributes[RERUN])
        return report

    def _hang(self, report: pytest.TestReport, attributes: dict[str, Any]) -> None:
        """Give a report the attributes that plugins gave it in the guest.

        None of them replaces anything that a report has, or that pytest looks for on one.
        """
        if len(attributes) > _MAX_ATTRIBUTES:
            raise broken(f"a report with more than {_MAX_ATTRIBUTES} attributes")
        for name, value in attributes.items():
            if _is_free(report, name):
                clean = self.value(value)
                setattr(report, name, _extras(clean) if name in _OF_HTML else clean)

    def value(self, value: object) -> Any:
        """A JSON value without tricks in its texts; paths of the project are those of here."""
        return _plain(value, self._local)

    def is_subtest(self, data: object) -> bool:
        """Whether a report is one beside those of a test's phases: of a subtest, or a call that is retried."""
        fields = _object(data)
        return fields.get("_report_type") == _SUBTEST or fields.get("outcome") == RETRIED

    def _subtest(
        self, item: pytest.Item, clean: dict[str, Any], context: dict[str, Any]
    ) -> pytest.TestReport:
        def make(data: dict[str, Any]) -> Any:
            return item.config.hook.pytest_report_from_serializable(config=item.config, data=data)

        more = {"_report_type": _SUBTEST, _CONTEXT: context, "$report_type": "TestReport"}
        report: pytest.TestReport = _made(make, {**clean, **more})
        if hasattr(report, "context"):  # pytest takes their repr, and the guest's has done so
            object.__setattr__(report.context, "kwargs", context["kwargs"])
        return report

    def collect_failure(self, data: object) -> Any:
        """Why a file could not be collected: what `pytest.CollectReport.longrepr` can be.

        Raises:
            GuestLost: it is no report.
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
        """A path, or a text that pytest cuts, with paths of the project as they are on this machine."""
        return self.text(colourless(path))

    def text(self, text: str) -> str:
        """A text with paths of the project as they are on this machine."""
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
            raise broken("a traceback's entry of an unknown kind", kind)
        return {"type": kind, "data": clean}


class _Text(TerminalRepr):
    """A reason of which only the text is known; unlike a `str`, no summary is made of it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write it; see pytest."""
        for line in self._text.splitlines():
            tw.line(line)


def recorded_warning(message: Message, reader: ReportReader) -> dict[str, Any]:
    """The arguments of ``pytest_warning_recorded`` for a warning from a guest.

    Raises:
        GuestLost: it is none.
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
    """A record of `logging` from a guest; its message is complete.

    Raises:
        GuestLost: it is none.
    """
    path = Path(reader.path(_object(value).get("pathname")))
    place = {"pathname": str(path), "filename": path.name, "module": path.stem}
    return logging.makeLogRecord({**_checked(value, **_RECORD), **place})


def _category(module: str, name: str) -> type[Warning]:
    """A class of that name; none is imported because a guest says so."""
    known = getattr({"builtins": builtins, "pytest": pytest}.get(module), name, None)
    if isinstance(known, type) and issubclass(known, Warning):
        return known
    name = name if name.isidentifier() else "Warning"
    return type(name, (Warning,), {"__module__": module[:200]})


# What attributes of a report may not be called, beside all that it has: pytest keeps it in a report
# or passes it by name, xdist and plugins of reruns add it.
_TAKEN = {
    *dir(pytest.CollectReport), "_id", "_report_type", "cls", "context", "id", "item_index", "node",
    "rerun", "result", "self", "testrun_uid", "wasxfail", "worker_id",
}  # fmt: skip


def _is_free(report: pytest.TestReport, name: str) -> bool:
    """Whether an attribute can be called so: it hides nothing. Names with ``vm_`` are ours."""
    if not name.isidentifier() or name.startswith(("__", "vm_")):
        return False
    return name not in _TAKEN and not hasattr(report, name)


def _extras(value: object) -> list[dict[str, Any]]:
    """What pytest-html shows beside a test. It writes files, and the extension ends their names."""
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
_OF_HTML = ("extras", "extra")  # attributes of which pytest-html makes more than text

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
    """A report of pytest's, which has its own idea of what is well-formed."""
    longrepr = data["longrepr"]
    plain = not isinstance(longrepr, dict)
    try:  # pytest takes a text with certain words in it for a traceback
        report = make({**data, "longrepr": None} if plain else data)
    except Exception as error:
        raise broken("a report that pytest does not take") from error
    if plain:
        report.longrepr = longrepr
    return report


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise broken("something else where an object should be", value)
    return value


def _checked(value: object, **checks: Callable[[Any], Any]) -> dict[str, Any]:
    """The fields of an object, what each check makes of its own."""
    fields = _object(value)
    return {name: check(fields.get(name)) for name, check in checks.items()}


def _list(value: object, most: int, least: int = 0) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise broken("something else where a list should be, or one of the wrong length", value)
    return value


def _row(value: object, *checks: Callable[[Any], Any]) -> tuple[Any, ...]:
    """The members of a list, what each check makes of its own."""
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
        raise broken("something else where a line's number should be", value)
    return value


def _number(value: object, limit: float = 1e12) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < limit:
        raise broken("something else where a number should be", value)
    return float(value) if math.isfinite(value) else 0.0


def _one_of(value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise broken(f"something else where one of {', '.join(allowed)} should be", value)
    return value


def _source(lines: list[str]) -> list[str]:
    return list(takewhile(lambda line: not line.startswith(_FAILURE), lines))


def _separator(value: object) -> str:
    text = harmless(value)[:1]
    return text if text.isprintable() and text else "-"


def _plain(value: object, text: Callable[[str], str] = harmless) -> Any:
    """Any JSON value, its texts without tricks. Numbers that xdist does not send become texts."""
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
    """The number of a process or a thread; 0 where it has none."""
    return int(_number(value or 0, 1e20))


# What a record of `logging` has, besides its place.
_RECORD: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("name", "levelname", "msg"), harmless),
    **dict.fromkeys(("funcName", "processName", "threadName", "taskName"), _optional),
    **dict.fromkeys(("exc_text", "stack_info"), _optional),
    **dict.fromkeys(("levelno", "lineno"), _integer),
    **dict.fromkeys(("created", "msecs"), _number),
    **dict.fromkeys(("process", "thread"), _identity),
}
