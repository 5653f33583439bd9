"""What the suite tests."""

from pathlib import Path


def system() -> str:
    """The name of the system that this runs on."""
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("VERSION_CODENAME=")).partition("=")[2]
