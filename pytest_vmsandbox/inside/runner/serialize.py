"""Makes JSON values from pytest's reports.

pytest can serialize reports, too. But it uses modules that tests may patch, and plain pytest does not
serialize.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from _pytest._io import TerminalWriter

from .apart import keep_apart
from .wire import JSON, Plain, clean

keep_apart(globals())

MAX_REPORT = 4 << 20  # characters; JSON may be longer
MAX_ATTRIBUTES = 100  # of a report, from plugins and conftest files
MAX_ATTRIBUTE_BYTES = 6 << 20  # of all these attributes together, as JSON
PLACE = ("path", "lineno", "message")
# The attributes of pytest's own reports. All others come from plugins or conftest files.
FIELDS = {
    "_id", "nodeid", "location", "keywords", "outcome", "longrepr", "when", "sections", "duration",
    "user_properties", "start", "stop", "wasxfail", "context", "result",
}  # fmt: skip


def serialized(report: pytest.TestReport | pytest.CollectReport) -> dict[str, Any]:
    """The content of a report. For a `TestReport`, the host adds keywords and location."""
    data: dict[str, Any] = {name: value for name, value in vars(report).items() if name in FIELDS}
    data["nodeid"] = str(data.pop("_id", None) or data["nodeid"])  # `_id` since pytest 9.2
    data["longrepr"] = longrepr(report.longrepr)
    if type(report).__name__.lower() == "subtestreport":  # pytest's, or pytest-subtests'
        context = data.pop("context")
        data["_report_type"] = "SubTestReport"
        data["_subtest.context"] = {"msg": context.msg, "kwargs": context.kwargs}
    return data


def longrepr(value: Any) -> Any:
    """What went wrong, in the form of pytest's own serialized reports."""
    if not hasattr(value, "toterminal"):
        return value
    if not hasattr(value, "reprtraceback") or not hasattr(value, "reprcrash"):
        return {"text": text_of(value)}
    chain = getattr(value, "chain", None)
    return {
        "reprcrash": fields(value.reprcrash, *PLACE),
        "reprtraceback": trace(value.reprtraceback),
        "sections": value.sections,
        "chain": None
        if chain is None
        else [(trace(of), fields(crash, *PLACE), text) for of, crash, text in chain],
    }


SHOWN = io.StringIO()
SCREEN = TerminalWriter(SHOWN)


def text_of(value: Any) -> str:
    """The text that pytest would show for one of its representations."""
    SHOWN.seek(0)
    SHOWN.truncate()
    try:
        value.toterminal(SCREEN)
    except Exception as error:
        return "<%s that cannot be shown: %s>" % (type(value).__name__, type(error).__name__)
    return SHOWN.getvalue().strip()


def fields(value: Any, *names: str) -> dict[str, Any] | None:
    """Attributes of an object; None if there is no object."""
    return None if value is None else {name: getattr(value, name) for name in names}


def trace(value: Any) -> dict[str, Any]:
    """A traceback of pytest."""
    return {
        "reprentries": [entry(each) for each in value.reprentries],
        "extraline": value.extraline,
        "style": value.style,
    }


def entry(value: Any) -> dict[str, Any]:
    """An entry of a traceback of pytest."""
    data: dict[str, Any] = {"lines": value.lines, "style": value.style}
    if not hasattr(value, "reprfileloc"):
        return {"type": "ReprEntryNative", "data": data}
    data["reprfuncargs"] = fields(value.reprfuncargs, "args")
    data["reprlocals"] = fields(value.reprlocals, "lines")
    data["reprfileloc"] = fields(value.reprfileloc, *PLACE)
    return {"type": "ReprEntry", "data": data}


def attributes_of(report: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The attributes that plugins and conftest files have given a report: name → JSON value.

    Returns:
        The attributes, and messages about what is lost.
    """
    found: dict[str, Any] = {}
    notes: list[dict[str, Any]] = []
    room = MAX_ATTRIBUTE_BYTES
    for name, value in vars(report).items():
        if name in FIELDS:
            continue
        plain = Plain()
        try:
            if not isinstance(value, JSON) and not hasattr(value, "__fspath__"):
                raise TypeError
            found[name] = plain.of(value)
            room -= len(json.dumps(found[name]))
            if room < 0 or len(found) > MAX_ATTRIBUTES:
                raise OverflowError
            why = "texts" if plain.texts else ""
        except Exception as error:
            found.pop(name, None)
            why = "size" if isinstance(error, OverflowError) else "kind"
        if why:
            notes.append({"note": "attribute", "name": clean(str(name)), "why": why})
    return found, notes


def bounded(report: dict[str, Any]) -> dict[str, Any]:
    """A report that fits into one message. Captured output is shortened first."""
    size = sum(len(text) for _, text in report["sections"]) + len(str(report["longrepr"]))
    if size + len(str(report["user_properties"])) > MAX_REPORT:
        report["sections"] = [
            [name, text[:100_000] + "\n[the rest was too much to be sent]"]
            for name, text in report["sections"][:20]
        ]
        report["user_properties"] = []
        if size > MAX_REPORT and len(str(report["longrepr"])) > MAX_REPORT:
            report["longrepr"] = "(too long to be sent)"
    return report
