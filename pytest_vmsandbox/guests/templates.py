"""Templates: saved guests in the user's cache. They were saved while they were quiet.

A template is a folder with the guest's memory, the state of its devices, what it had written to each
disk and to its console, and the key that opens it. Nobody writes to it. Its name is a digest of everything that it depends
on, so it is never stale, only unused.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from pytest_vmsandbox.cache.store import PRIVATE_KEY, TEMPLATES, Entry, Store
from pytest_vmsandbox.core.errors import LaunchError

MEMORY, STATE, CONSOLE = "memory", "state", "console"


class NoTemplateError(LaunchError):
    """There can be no template of these guests here. They can still be booted.

    Attributes:
        reason: one word for programs, such as the table of all systems.
    """

    def __init__(
        self, brief: str, *, reason: str = "template", details: str = "", remedy: str = ""
    ) -> None:
        super().__init__(brief, details=details, remedy=remedy)
        self.reason = reason


def layer_name(disk: int, depth: int) -> str:
    """The file with what was written to a disk."""
    return f"disk{disk}.{depth}.qcow2"


class Template(Entry):
    """A saved guest."""

    @property
    def key(self) -> str:
        """Its name: the digest of everything that it depends on."""
        return self.folder.name

    @property
    def image(self) -> str:
        """The name of its image."""
        return str(self.record["image"])

    @property
    def name(self) -> str:
        """The guest's name when it booted."""
        return str(self.record["name"])

    @property
    def layers(self) -> tuple[tuple[Path, ...], ...]:
        """For each disk, the files with what was written to it, lowest first."""
        return tuple(tuple(self.folder / name for name in names) for names in self.record["layers"])

    @property
    def disk(self) -> str:
        """The digest of the image's disk below them; empty without a disk."""
        return str(self.record["disk"])

    @property
    def facts(self) -> dict[str, object]:
        """Values that its builder has kept with it."""
        return dict(self.record["facts"])

    @property
    def helper(self) -> dict[str, Any]:
        """How the guest got its helper; empty if it has one of its own."""
        return dict(self.record.get("helper", {}))

    @property
    def memory(self) -> Path:
        """The guest's memory."""
        return self.folder / MEMORY

    @property
    def private_key(self) -> str:
        """The key that opens it, in OpenSSH's format."""
        return (self.folder / PRIVATE_KEY).read_text(encoding="utf-8")

    @property
    def console(self) -> str:
        """What the guest had written to its console, also as the templates below this one."""
        return (self.folder / CONSOLE).read_text("utf-8")

    def state(self) -> IO[bytes]:
        """The state of its devices, open for reading."""
        return (self.folder / STATE).open("rb", buffering=0)


class TemplateStore(Store[Template]):
    """The templates of one cache folder: ``<cache>/templates/<key>/``."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, TEMPLATES, Template)

    def of_image(self, image: str) -> list[Path]:
        """The folders of an image's templates."""
        return [template.folder for template in self.all() if template.image == image]
