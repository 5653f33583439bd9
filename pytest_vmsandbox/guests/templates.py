"""Templates: guests whose state was saved while they were quiet, in the user's cache.

A template is a folder: the guest's memory, the state of its devices, what it had written to each
disk, and the key that opens it. Nobody writes to it. It is named by the digest of all that it
depends on, so it is never stale, only unused.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from pytest_vmsandbox.cache.store import PRIVATE_KEY, TEMPLATES, Entry, Store

MEMORY, STATE = "memory", "state"


def layer_name(disk: int, depth: int) -> str:
    """The file with what was written to a disk."""
    return f"disk{disk}.{depth}.qcow2"


class Template(Entry):
    """A saved guest."""

    @property
    def key(self) -> str:
        """What it is called: the digest of all that it depends on."""
        return self.folder.name

    @property
    def image(self) -> str:
        """The name of its image."""
        return str(self.record["image"])

    @property
    def name(self) -> str:
        """What the guest was called when it booted."""
        return str(self.record["name"])

    @property
    def layers(self) -> tuple[tuple[Path, ...], ...]:
        """For each disk the files with what was written to it, lowest first."""
        return tuple(tuple(self.folder / name for name in names) for names in self.record["layers"])

    @property
    def disk(self) -> str:
        """The digest of the image's disk below them; empty where there is none."""
        return str(self.record["disk"])

    @property
    def facts(self) -> dict[str, object]:
        """What whoever saved it wants to know of it."""
        return dict(self.record["facts"])

    @property
    def memory(self) -> Path:
        """The guest's memory."""
        return self.folder / MEMORY

    @property
    def private_key(self) -> str:
        """The key that opens it, in OpenSSH's format."""
        return (self.folder / PRIVATE_KEY).read_text(encoding="utf-8")

    def state(self) -> IO[bytes]:
        """The state of its devices, to be read once."""
        return (self.folder / STATE).open("rb", buffering=0)


class TemplateStore(Store[Template]):
    """The templates of one cache folder: ``<cache>/templates/<key>/``."""

    def __init__(self, cache: Path) -> None:
        super().__init__(cache, TEMPLATES, Template)

    def of_image(self, image: str) -> list[Path]:
        """Where the templates of an image lie."""
        return [template.folder for template in self.all() if template.image == image]
