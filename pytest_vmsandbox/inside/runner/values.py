"""Values as JSON has them."""

from __future__ import annotations

import json
import os
from typing import Any

from .apart import keep_apart

keep_apart(globals())

MAX_TEXT = 4 << 20  # characters of one string in a message
MAX_VALUES = 100_000  # in what a plugin has made
MAX_DEPTH = 20  # of lists and objects in each other, in that
JSON = (bool, int, float, str, list, tuple, dict, type(None))


def clean(value: Any, depth: int = 0) -> Any:
    """A value as JSON can carry it: what it cannot becomes its repr, what is long is cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            gone = len(value) - MAX_TEXT
            half = MAX_TEXT // 2
            value = "%s\n[%d characters left out]\n%s" % (value[:half], gone, value[-half:])
        return str.encode(value, "utf-8", "backslashreplace").decode()
    if isinstance(value, int) and abs(value) < 1 << 64:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if depth > 40:
        return "…"
    if isinstance(value, dict):
        return {clean(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(item, depth + 1) for item in value]
    try:
        if hasattr(value, "__fspath__"):
            return clean(os.fspath(value), depth)
        return clean(repr(value), depth)
    except Exception as error:
        return "<%s whose repr() fails: %s>" % (type(value).__name__, type(error).__name__)


class Plain:
    """Makes a value one that JSON has; members that it does not have become texts."""

    def __init__(self) -> None:
        self.values = 0
        self.texts = False  # whether there was such a member

    def of(self, value: Any, depth: int = 0) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise OverflowError
        if isinstance(value, dict):
            self.texts = self.texts or not all(isinstance(key, str) for key in value)
            return {clean(str(key)): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        elif not isinstance(value, JSON):
            self.texts = self.texts or not hasattr(value, "__fspath__")
            value = str(value)
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise OverflowError
        return clean(value)


def portable(value: Any) -> Any:
    """A value that JSON keeps as it is; of another, the text that junit's file has of it."""
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except Exception:  # noqa: S110  # then as text
        pass
    try:
        return str(value)
    except Exception:
        return value
