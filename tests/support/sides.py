"""Runs of pytest on a project, inside guests and without: the guest is this machine.

The same programs, the same files, nothing in between but the wire.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from support import fidelity
from support.environment import WITHOUT_HYPOTHESIS, without_ours
from support.fidelity import Line, Run, Said

IMAGE = "debian-13"
SUPPORT = Path(fidelity.__file__).parent
# Plugins that stay on the host have no frames, and no fixtures, in a guest's reports.
HOST_ONLY = (
    *("vmsandbox", "pytest_cov", "pytest_forked", "timeout"),
    *("html", "html_fixtures", "metadata"),
)
PLAIN = tuple(word for name in HOST_ONLY for word in ("-p", f"no:{name}"))
INSIDE = ("-p", "vmsandbox_local", "--in-vm")


class Sides:
    """Both ways to run a project.

    Args:
        folder: where the project lies, as ``suite``, and what the runs leave.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.suite = folder, folder / "suite"
        self.reader = fidelity.Reader(IMAGE, {str(self.suite): "<suite>", str(folder): ""})

    @classmethod
    def with_every_outcome(cls, folder: Path) -> Sides:
        """A copy of the project with every kind of outcome."""
        sides = cls(folder)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(fidelity.OUTCOMES, sides.suite, ignore=ignored)
        return sides

    @classmethod
    def of(cls, folder: Path, files: dict[str, str]) -> Sides:
        """A project of these files: path → text."""
        sides = cls(folder)
        for name, text in files.items():
            file = sides.suite / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return sides

    def differences(self, line: Line) -> list[str]:
        """What differs between the two ways, in words."""
        plain = self.plain(line)
        assert len(plain.cases) > 1, plain.screen
        return fidelity.differences(self.inside(line), plain)

    def inside(self, line: Line) -> Run:
        """What comes of a run inside a guest."""
        return self.reader.read(self.run("inside", line, *INSIDE), ordered=line.ordered)

    def plain(self, line: Line) -> Run:
        """What comes of plain pytest."""
        xdist = () if "-n" in line.args else ("-p", "no:xdist")
        return self.reader.read(self.run("plain", line, *PLAIN, *xdist), ordered=line.ordered)

    def run(self, side: str, line: Line, *args: str) -> Said:
        """Run pytest: one side's way, with further arguments before those of the line."""
        junit = self.folder / f"{side}.xml"
        junit.unlink(missing_ok=True)
        kept = {
            name: value
            for name, value in without_ours("PYTHON").items()
            if name not in ("CI", "BUILD_NUMBER")
        }
        environment = {
            **kept, "LC_ALL": "C.UTF-8", "COLUMNS": "300", "TMPDIR": str(self.folder), **line.environment,
            "PYTHONPATH": f"{SUPPORT.parent}:{SUPPORT}", "VMSANDBOX_CACHE": str(self.folder / "c"),
            "VMSANDBOX_RUNTIME": str(self.folder / "r"),
        }  # fmt: skip
        arguments = [*args, *line.arguments(IMAGE if side == "inside" else None)]
        if "no:junitxml" not in arguments:
            arguments.insert(0, f"--junitxml={junit}")
        if "no:cacheprovider" not in arguments:
            arguments[:0] = ["-o", f"cache_dir={self.folder / side}-cache"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *WITHOUT_HYPOTHESIS, "--ignore=apart", *arguments],
            cwd=self.suite, env=environment, timeout=100, check=False, stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return Said(
            status=done.returncode,
            screen=done.stdout.decode(errors="backslashreplace"),
            junit=junit.read_bytes() if junit.exists() else b"",
        )
