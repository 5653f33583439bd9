"""The Python distributions that are installed on this machine, and which of them stay here."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

OURSELVES = "pytest-vmsandbox"
SITES = {"site-packages", "dist-packages"}

# A guest gets none of these, and nothing that only they need.
LEFT_OUT = frozenset(
    {
        OURSELVES,
        # They install, and nothing can be installed from within a guest.
        *("pip", "uv", "wheel"),
        # They start test runs, or look at the sources.
        *("mypy", "nox", "pre-commit", "ruff", "tox"),
        # Plugins that select tests, which is done here.
        *("pytest-picked", "pytest-shard", "pytest-split", "pytest-testmon"),
    }
)
# Plugins that do their work where the run is: here. They are installed in the guest, for conftest
# files that import them, and not loaded there.
HOST_ONLY = frozenset(
    {"pytest-cov", "pytest-forked", "pytest-reportlog", "pytest-timeout", "pytest-xdist"}
)


def installed(sys_path: Sequence[str] | None = None) -> dict[str, Distribution]:
    """The distributions on `sys_path` (default: Python's own) by canonical name.

    Of several with one name, the first counts, as it does for an import.
    """
    return _installed(tuple(sys.path if sys_path is None else sys_path))


@cache  # reading all metadata takes a tenth of a second, and nothing is installed during a run
def _installed(path: tuple[str, ...]) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    for distribution in importlib.metadata.distributions(path=list(path)):
        # A removal may leave metadata without a name. Asking for its key makes Python 3.12 warn.
        if name := dict(distribution.metadata.items()).get("Name"):  # type: ignore[attr-defined]
            found.setdefault(canonicalize_name(name), distribution)
    return found


def origin(distribution: Distribution) -> dict[str, Any]:
    """What ``direct_url.json`` says (PEP 610); empty for what came from a package index."""
    try:
        found = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def home(distribution: Distribution) -> Path:
    """The folder that holds a distribution's metadata: an entry of ``sys.path``."""
    return Path(str(distribution.locate_file("")))


def is_local(distribution: Distribution) -> bool:
    """Whether a distribution did not come from a package index."""
    developed = home(distribution).name not in SITES
    return bool(origin(distribution)) or (developed and bool(distribution.read_text("PKG-INFO")))


def requirements_of(distribution: Distribution) -> Iterator[Requirement]:
    """What a distribution needs, with all its extras, on all Pythons and platforms."""
    for line in distribution.requires or ():
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue  # it is older than PEP 508; pip ignores it, too


def is_imported(name: str) -> bool:
    """Whether this process has imported anything of a distribution."""
    return any(
        module in sys.modules and any(canonicalize_name(one) == name for one in distributions)
        for module, distributions in importlib.metadata.packages_distributions().items()
    )


def providers(module: str) -> list[str]:
    """The names of the distributions that installed a top-level module here."""
    return sorted(set(importlib.metadata.packages_distributions().get(module, ())))
