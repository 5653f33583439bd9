"""The resident helper, as a static program for each architecture: from the wheel, or made here."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path

from pytest_vmsandbox.cache.store import HELPERS, IN_USE, Entry, Store
from pytest_vmsandbox.catalogue import programs
from pytest_vmsandbox.catalogue.definition import LARGEST_SCRIPT, ImageDefinition
from pytest_vmsandbox.catalogue.making import run_to_end
from pytest_vmsandbox.catalogue.own import HELPER_VARIABLE, helper_file
from pytest_vmsandbox.core.architecture import ARCHITECTURES, debian_name, native_architecture
from pytest_vmsandbox.core.errors import ImageError

COMPILERS = ("cc", "gcc", "clang")  # the first one that is here makes this machine's program
OPTIONS = ("-Os", "-static", "-s")
SUMS = "SHA256SUMS"  # beside the source: its digest, and those of the programs in the wheel
_PACKAGED = Path(__file__).resolve().parent.parent / "helpers"  # only in a wheel
_PROGRAM, _LIBRARY = "helper", "libc.a"
_ROOT, _PLACES_OF_LIBRARY = Path("/"), ("usr/lib*/libc.a", "usr/lib/*-linux-*/libc.a")
_ZIG = "ziglang"  # the package, and its module
_FULL = ("No space left", "NoSpaceLeft", "Disk quota exceeded")  # as compilers say it
_ROOM = "make room, or set the environment variables VMSANDBOX_CACHE and TMPDIR to folders on a larger disk"
_SECONDS = 600.0  # for one compiler. Zig takes minutes where much else runs
_MACHINE = slice(18, 20)  # where a program has the number of its machine


def helper_program(
    architecture: str, cache: Path, *, say: Callable[[str], object] = lambda _: None
) -> Path:
    """The static helper for guests of an architecture. It is made if neither wheel nor cache has it.

    Args:
        architecture: one of `core.architecture.ARCHITECTURES`.
        cache: the user's cache.
        say: gets lines for people about long waits.

    Raises:
        ImageError: no program of this machine can make it.
        CacheError: it cannot be kept.
    """
    source = helper_source()
    packaged = _PACKAGED / architecture
    if _is_current(packaged, source):
        return packaged
    store, key = _place(architecture, source, cache)
    kept = store.get(key)
    if kept is not None and kept.damage():
        store.throw_away(key, kept)
        kept = None
    if kept is None:
        maker = _Maker(architecture, source, store, key, say)
        kept = store.make(
            key,
            maker.fill,
            on_busy=lambda: say(
                f"waiting: another process makes the helper for {debian_name(architecture)}"
            ),
        )
    with suppress(OSError):  # the cache may be read-only
        os.utime(kept.folder / IN_USE)
    return kept.folder / _PROGRAM


def lacking(architecture: str, cache: Path) -> tuple[str, ...]:
    """The programs that are missing to make the helper of this machine; see `programs.package_of`.

    It is empty if nothing has to be made, and if such programs would not help: then `helper_program`
    has the reason.

    Raises:
        ImageError: the source is missing.
    """
    source = helper_source()
    store, key = _place(architecture, source, cache)
    if _is_current(_PACKAGED / architecture, source) or store.get(key) is not None:
        return ()
    return _lacking(architecture)


def _lacking(architecture: str) -> tuple[str, ...]:
    """The programs whose packages would help to make a helper."""
    if not _is_native(architecture) or _has_zig():
        return ()
    compiler = _compiler()
    has_library = _is_library_here() if compiler is None else _has_library(compiler)
    missing = () if compiler is not None else COMPILERS[:1]
    return missing if has_library else (*missing, _LIBRARY)


def is_named_by(definition: ImageDefinition, variable: str = HELPER_VARIABLE) -> bool:
    """Whether a recipe, or a file that it uses, names a variable, such as that of the helper's path."""
    return bool(definition.recipe) and any(
        file.stat().st_size < LARGEST_SCRIPT and variable.encode() in file.read_bytes()
        for _, file in definition.files()
    )


def helper_source() -> Path:
    """The source of the helper.

    Raises:
        ImageError: it is missing.
    """
    if (source := helper_file()) is not None:
        return source
    raise ImageError(
        "helper.c, the source of the program that runs in guests, is missing",
        remedy="install pytest-vmsandbox again",
    )


def _place(architecture: str, source: Path, cache: Path) -> tuple[Store[Entry], str]:
    """Where the program is kept: the store, and the key in it."""
    return Store(cache, HELPERS, Entry), f"{architecture}-{_digest(source)[:16]}"


def _is_current(program: Path, source: Path) -> bool:
    """Whether a packaged program is there, undamaged, and was made from this source."""
    sums = recorded(source)
    with suppress(OSError):
        found = _digest(program)
        return sums.get(program.name) == found and sums.get(source.name) == _digest(source)
    return False


def recorded(source: Path) -> dict[str, str]:
    """The digests beside the source: of the source and of each packaged program."""
    try:
        lines = source.with_name(SUMS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class _Maker:
    """Makes a program for the store."""

    architecture: str
    source: Path
    store: Store[Entry]
    key: str  # in the store
    say: Callable[[str], object]

    def fill(self, folder: Path, lock: int) -> dict[str, object]:
        """Put the program into a folder. Returns the content of the record."""
        slow = "" if _is_native(self.architecture) else ", which takes minutes, once"
        self.say(f"making the helper for {debian_name(self.architecture)}{slow}")
        failures = []
        for compiler in _compilers(self.architecture):
            # Each call has a new work folder, which is Zig's cache, too.
            with self.store.work_folder(self.key, Path(tempfile.gettempdir())) as work:
                why = compiled(
                    compiler, self.architecture, self.source, folder / _PROGRAM, work, lock
                )
            if not why:
                return {"compiler": list(compiler)}
            failures.append(f"{' '.join(compiler)}: {why}")
        details = "\n".join(failures)
        is_full = any(text in details for text in _FULL)
        raise ImageError(
            f"the helper for guests of {debian_name(self.architecture)} cannot be made here",
            details=details,
            remedy=_ROOM if is_full else _remedy(self.architecture),
        )


def _compilers(architecture: str) -> Iterator[Sequence[str]]:
    """The starts of command lines that can compile for an architecture, in the order to try them.

    Zig is tried twice: it makes a C library first, from thousands of files in a folder for temporary
    ones, which somebody may tidy meanwhile.
    """
    if _is_native(architecture) and (compiler := _compiler()) is not None:
        yield [compiler]
    if _has_zig():
        yield from repeat(zig(architecture), 2)


def _has_zig() -> bool:
    return find_spec(_ZIG) is not None


def _is_native(architecture: str) -> bool:
    """Whether a compiler of this machine makes programs for an architecture."""
    return sys.platform == "linux" and architecture == native_architecture()


def _compiler() -> str | None:
    return next(filter(None, map(programs.find, COMPILERS)), None)


def _is_library_here() -> bool:
    """Whether the static C library is where the systems that we know have it."""
    return any(next(_ROOT.glob(pattern), None) for pattern in _PLACES_OF_LIBRARY)


def _has_library(compiler: str) -> bool:
    """Whether a compiler can link with the C library statically."""
    argv = [compiler, f"-print-file-name={_LIBRARY}"]
    with Path(os.devnull).open("rb") as nobodys:
        said = run_to_end(argv, _ROOT, os.environ, nobodys.fileno(), _SECONDS).output
    return said.splitlines()[-1:] != [_LIBRARY]  # otherwise, where it is


def zig(architecture: str) -> list[str]:
    """The start of a command line by which Zig compiles for an architecture."""
    return [sys.executable, "-m", _ZIG, "cc", "-target", ARCHITECTURES[architecture].zig]


def compiled(
    compiler: Sequence[str],
    architecture: str,
    source: Path,
    program: Path,
    work: Path,
    lock: int,
) -> str:
    """Make a static program.

    Args:
        compiler: the start of its command line.
        architecture: what the program is for.
        source, program: the files.
        work: a folder for temporary files. Those of Zig take megabytes.
        lock: the descriptor of a lock that is held until the compiler is gone.

    Returns:
        Why that failed; empty if it did not.
    """
    places = ("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    env = {**os.environ, "LC_ALL": "C.UTF-8", **dict.fromkeys(places, os.fspath(work))}
    argv = [*compiler, *OPTIONS, "-o", os.fspath(program), os.fspath(source)]
    why = run_to_end(argv, work, env, lock, _SECONDS).why
    if why or _is_for(architecture, program):
        return why
    return f"it made no program for {debian_name(architecture)}"


def _is_for(architecture: str, program: Path) -> bool:
    """Whether a program is one for an architecture, as its first bytes say."""
    try:
        with program.open("rb") as stream:
            head = stream.read(_MACHINE.stop)
    except OSError:  # a compiler may end well without it
        return False
    machine = head[_MACHINE]
    number = int.from_bytes(machine, "big" if head[5:6] == b"\2" else "little")
    return head[:4] == b"\x7fELF" and (*head[4:6], number) == ARCHITECTURES[architecture].elf


def _remedy(architecture: str) -> str:
    wheel = "install pytest-vmsandbox from a wheel, which brings this program"
    if missing := _lacking(architecture):
        needed = programs.install_line([*map(programs.package_of, missing)])
        return f"{needed}. Or {wheel}, or install {_ZIG} with it"
    if _has_zig() or _is_native(architecture):
        return f"if the details name no cause, try again. Or {wheel}"
    return f"{wheel}, or install {_ZIG} with it (pip install {_ZIG})"
