"""Shields this program from tests, which share its interpreter and may patch any name of any module.

A module of this program calls `keep_apart` after its imports. Then the modules that it uses are copies. A
function in a copy still looks up names in its original module. So while tests run, this program calls
only functions that are written in C, and those of `json`, whose code is executed a second time.
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import sys
import types

# The first descriptor that is out of the way of tests.
ASIDE = min(900, os.sysconf("SC_OPEN_MAX") // 2)
BUILTINS = dict(vars(builtins))
SHARED = {"sys": sys, "os": os}  # those modules that tests see, too
COPIES: dict[str, types.ModuleType] = {}


def keep_apart(names: dict[str, object]) -> None:
    """Let a module use modules and builtins that nobody else can patch.

    Args:
        names: its globals. Functions that are defined later use them.
    """
    names["__builtins__"] = BUILTINS
    for name, value in list(names.items()):
        if isinstance(value, types.ModuleType):
            if value.__name__ not in COPIES:
                COPIES[value.__name__] = types.ModuleType(value.__name__)
                vars(COPIES[value.__name__]).update(vars(value))
            names[name] = COPIES[value.__name__]


def executed_again(module: types.ModuleType) -> types.ModuleType:
    """A module with the same code, whose names nobody else can patch."""
    again = types.ModuleType(module.__name__)
    vars(again)["__builtins__"] = BUILTINS
    loader = vars(module)["__spec__"].loader
    exec(loader.get_code(module.__name__), vars(again))  # noqa: S102
    return again


keep_apart({"json": json})
vars(COPIES["json"]).update(
    dumps=executed_again(json.encoder).JSONEncoder().encode,
    loads=executed_again(json.decoder).JSONDecoder().decode,
)


def leave_modules() -> None:
    """Remove our modules from `sys.modules`, because some tools patch all modules in it.

    ``__main__`` becomes the same as for ``python -m pytest``.
    """
    import importlib.util

    spec = importlib.util.find_spec("pytest.__main__")
    assert spec is not None
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    sys.modules["__main__"] = main
    package = __name__.partition(".")[0]
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            del sys.modules[name]


def aside(fd: int) -> int:
    """Move a file to a descriptor that is out of the way of tests, which may close low ones."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, ASIDE)
    os.close(fd)
    return moved


keep_apart(globals())
