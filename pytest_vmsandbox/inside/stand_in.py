"""A Python that describes itself as a guest's, so that uv resolves and unpacks wheels for that guest.

uv has names for some platforms only. For any other one it asks an interpreter what it is. So we make a
virtual environment of this machine's Python that says what the guest's would say. It runs nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CHANGES = """\
import os, platform, sys, sysconfig

sys.platform = "linux"
platform.system = lambda: "Linux"
platform.machine = lambda: {machine!r}
sysconfig.get_platform = lambda: "linux-" + {machine!r}
os.confstr = {{"CS_GNU_LIBC_VERSION": "glibc " + {libc!r}}}.get
"""


def make(folder: Path, machine: str, libc: str) -> Path:
    """Make such an environment.

    Args:
        folder: a new folder for it. uv remembers what the interpreter in it said, so use a name only once.
        machine: what ``platform.machine()`` says in the guest.
        libc: the version of the guest's glibc, such as ``2.41``.

    Returns:
        Its interpreter.
    """
    base = Path(getattr(sys, "_base_executable", None) or sys.executable)
    packages = folder / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    packages.mkdir(parents=True)
    (packages / "stand_in.py").write_text(_CHANGES.format(machine=machine, libc=libc), "utf-8")
    (packages / "stand_in.pth").write_text("import stand_in\n", "utf-8")
    (folder / "pyvenv.cfg").write_text(f"home = {os.fspath(base.parent)}\n", "utf-8")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.symlink_to(base)
    return python
