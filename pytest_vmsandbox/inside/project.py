"""The project under test on this machine: what a guest needs besides its tree."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from packaging.utils import canonicalize_name

from pytest_vmsandbox.core.errors import TransferError
from pytest_vmsandbox.inside import distributions

_SOURCES = (
    "src",
    "",
    "lib",
    "python",
)  # folders that may hold a project's modules, likeliest first
_METADATA = ("entry_points.txt", "top_level.txt")
_WHEEL = (
    "Wheel-Version: 1.0\nGenerator: pytest-vmsandbox\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
)
_CODE = {".py", ".so"}
_EDITABLE = re.compile(r"_*editable")  # the start of the names of build backends' finders


@dataclass(frozen=True, kw_only=True)
class Project:
    """The project under test.

    Args:
        root: pytest's rootdir.
        names: canonical names of the installed distributions whose source is the tree at `root`.
            A workspace has several. If nothing of it is installed, there are none.
        import_roots: POSIX paths relative to `root` that come first on ``sys.path`` in the guest.
            ``""`` is `root` itself, and ``..`` leads to folders outside of it.
        modules: POSIX paths relative to `root` of the distributions' modules, files and folders. They
            go to the guest completely, including what git ignores: generated versions, compiled
            modules, translations.
        metadata: files for site-packages by path: the distributions' ``.dist-info`` folders.
        scripts: files for the folder bin by name: the distributions' programs.
    """

    root: Path
    names: tuple[str, ...]
    import_roots: tuple[str, ...]
    modules: tuple[str, ...]
    metadata: Mapping[str, bytes]
    scripts: Mapping[str, bytes]

    @classmethod
    def of(
        cls, root: Path, sys_path: Sequence[str] | None = None, *, outside: Sequence[Path] = ()
    ) -> Project:
        """The project in `root`.

        Args:
            root: pytest's rootdir.
            sys_path: the import path on this machine; default: ``sys.path``.
            outside: folders elsewhere that also go to the guest, with links resolved.

        Raises:
            TransferError: a module that is installed here is not in the tree.
        """
        path = sys.path if sys_path is None else sys_path
        tree = _ProjectFolder(root, outside)
        found = {
            name: one for name, one in distributions.installed(path).items() if tree.has(name, one)
        }
        places = map(tree.relative, path)
        import_roots = dict.fromkeys(place for place in places if place is not None)
        modules: dict[str, None] = {}
        metadata: dict[str, bytes] = {}
        scripts: dict[str, bytes] = {}
        for name, distribution in found.items():
            for module in _modules(distribution, name):
                where = tree.where(module, import_roots, distribution)
                if where is not None:
                    import_roots[where] = None
                    modules |= dict.fromkeys(tree.places(where, module))
            metadata |= _metadata(name, distribution)
            scripts |= distributions.console_scripts(distribution)
        return cls(
            root=root,
            names=tuple(sorted(found)),
            import_roots=tuple(import_roots),
            modules=tuple(modules),
            metadata=metadata,
            scripts=scripts,
        )


def foreign_folder(module: str, root: Path) -> Path | None:
    """The folder of a top-level module on this machine, if guests do not have it.

    Guests have modules of the project at `root` and installed ones.
    """
    paths = sysconfig.get_paths()
    known = [root, *(Path(paths[name]) for name in ("stdlib", "platstdlib", "scripts"))]
    tops = [os.path.realpath(folder) for folder in known]
    for folder in _folders_of(module):
        is_installed = not distributions.SITES.isdisjoint(folder.parts)
        if not is_installed and not any(map(folder.is_relative_to, tops)):
            return folder
    return None


def _folders_of(module: str) -> list[Path]:
    """The folders, with links resolved, from which a top-level module is imported here."""
    spec = None
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
    if spec is None:
        return []
    places: Iterable[str | None] = spec.submodule_search_locations or [spec.origin]
    folders = [Path(place).parent for place in places if place and Path(place).exists()]
    return [Path(os.path.realpath(folder)) for folder in folders]


class _ProjectFolder:
    """A project's folder and further folders, without the virtual environments in them."""

    def __init__(self, root: Path, outside: Sequence[Path] = ()) -> None:
        self.root = Path(os.path.realpath(root))
        self._outside = outside
        self._name = _declared_name(self.root)

    def relative(self, path: str) -> str | None:
        """The POSIX path of a folder of the tree, relative to the root; None if it is not in the tree."""
        folder = Path(os.path.realpath(path or "."))
        tops = [top for top in (self.root, *self._outside) if folder.is_relative_to(top)]
        if not tops or not folder.is_dir():
            return None
        above = {folder, *folder.parents} - {tops[0], *tops[0].parents}
        prefixes = {Path(os.path.realpath(prefix)) for prefix in (sys.prefix, sys.base_prefix)}
        if (
            not distributions.SITES.isdisjoint(folder.relative_to(tops[0]).parts)
            or not prefixes.isdisjoint(above)
            or any((place / "pyvenv.cfg").exists() for place in above)
        ):
            return None
        return "" if folder == self.root else os.path.relpath(folder, self.root)

    def has(self, name: str, distribution: Distribution) -> bool:
        """Whether the tree is the source of an installed distribution."""
        sources = map(self.relative, distributions.sources(distribution))
        return name == self._name or any(source is not None for source in sources)

    def where(
        self, module: str, import_roots: Iterable[str], distribution: Distribution
    ) -> str | None:
        """The folder from which a top-level module of a distribution is imported.

        None without a folder: an import hook builds it, or it has another name.

        Raises:
            TransferError: the module is installed here, but is not in the tree.
        """
        folders: Iterable[str | None] = (*import_roots, *_SOURCES)
        if is_editable := distributions.is_editable(distribution):  # a finder may find it
            folders = (*folders, *(self.relative(str(place)) for place in _folders_of(module)))
        for folder in folders:
            if folder is not None and self._holds(folder, module):
                return folder
        if is_editable:
            return None
        raise TransferError(
            f"the module {module!r} of {canonicalize_name(distribution.name)} is installed on this"
            f" machine, but not in {self.root}. Guests get only what is in that folder",
            remedy="if the module is compiled, build it in that folder (`pip install -e .`), with the"
            " guest's version of Python",
        )

    def places(self, where: str, module: str) -> list[str]:
        """The POSIX paths of a top-level module, relative to the root; none behind a link."""
        base = self.root / where
        if Path(os.path.realpath(base)) != base:  # also for folders outside: they go completely
            return []
        folder = [base / module] if (base / module).is_dir() else []
        places = (*folder, *_files(base, module))
        return [place.relative_to(self.root).as_posix() for place in places]

    def _holds(self, where: str, module: str) -> bool:
        base = self.root / where
        return any(_files(base, module)) or any((base / module).rglob("*.py"))


def _files(base: Path, module: str) -> Iterator[Path]:
    return (file for pattern in ("py", "*so") for file in sorted(base.glob(f"{module}.{pattern}")))


def _declared_name(root: Path) -> str | None:
    """The canonical name in a project's metadata."""
    name: object = None
    with suppress(OSError, ValueError, AttributeError):  # missing or invalid: not our concern
        tables = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        poetry = tables.get("tool", {}).get("poetry", {})
        name = tables.get("project", {}).get("name") or poetry.get("name")
    if name is None:
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(configparser.Error, UnicodeDecodeError):
            parser.read(root / "setup.cfg", encoding="utf-8")
        name = parser.get("metadata", "name", fallback=None)
    return canonicalize_name(name) if isinstance(name, str) else None


def _modules(distribution: Distribution, name: str) -> list[str]:
    """The top-level modules of a distribution."""
    if (listed := distribution.read_text("top_level.txt")) is not None:
        found = set(listed.split())
    else:
        files = distribution.files or ()  # paths relative to site-packages
        found = {file.parts[0].partition(".")[0] for file in files if file.suffix in _CODE}
    found = {module for module in found if module.isidentifier() and not _EDITABLE.match(module)}
    if not found and distributions.is_editable(distribution):
        found = {name.replace("-", "_")}
    return sorted(found)


def _metadata(name: str, distribution: Distribution) -> dict[str, bytes]:
    """The files of a ``.dist-info`` folder by path below site-packages."""
    folder = f"{name.replace('-', '_')}-{distribution.version}.dist-info"
    texts = {file: distribution.read_text(file) for file in _METADATA}
    texts["METADATA"] = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    texts["WHEEL"] = distribution.read_text("WHEEL") or _WHEEL
    texts["INSTALLER"] = "pytest-vmsandbox\n"
    files = {f"{folder}/{file}": text.encode() for file, text in texts.items() if text}
    return distributions.with_record(files, folder)
