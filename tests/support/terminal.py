"""Records the picture of README.md: a run of the quick start's suite, as a terminal shows it.

    python tests/support/terminal.py docs/terminal.svg

It needs real guests, and the images ``debian-12`` and ``debian-13``. The suite runs twice: guests
are clones already when it is recorded, as in most runs.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pytest_vmsandbox.cli import quickstart

SUITE = Path(quickstart.__file__).with_name("quickstart_suite")
COMMAND = "pytest -v --no-header --vm='debian-1[23]'"
COLUMNS, LINES = 110, 50


def main() -> None:
    """Record the run and write the picture."""
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="vmsandbox-terminal-") as folder:
        shutil.copytree(SUITE, folder, dirs_exist_ok=True)
        recorded(COMMAND, Path(folder))
        status, output = recorded(COMMAND, Path(folder))
    if status:
        sys.exit(f"{COMMAND} ended with status {status}:\n{output}")
    target.write_text(picture(f"\x1b[1m$ {COMMAND}\x1b[0m\n{output}"), encoding="utf-8")


def recorded(command: str, folder: Path) -> tuple[int, str]:
    """Run a command in a terminal; its status, and all that it wrote there, colours too."""
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": beside_python, "TERM": "xterm-256color"}
    for name in ("PYTEST_ADDOPTS", "PY_COLORS", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        environment.pop(name, None)
    ours, theirs = pty.openpty()
    output = b""
    with open(ours, "rb", buffering=0) as terminal:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", LINES, COLUMNS, 0, 0))
        with subprocess.Popen(
            command,
            shell=True,
            cwd=folder,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        ) as process:
            os.close(theirs)
            try:
                while part := terminal.read(65536):
                    output += part
            except OSError as error:
                if error.errno != errno.EIO:  # that is a terminal that everybody has closed
                    raise
    return process.returncode, output.decode().replace("\r\n", "\n")


def picture(text: str) -> str:
    """An SVG of a terminal with this text, which may have colours. It loads no font."""
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(Text.from_ansi(text.rstrip()))
    svg = console.export_svg(title="", unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"


if __name__ == "__main__":
    main()
