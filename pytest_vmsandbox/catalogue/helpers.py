"""The resident helper, as a static program for each architecture: from the wheel, or made here."""

from __future__ import annotations

import hashlib
import os
import subprocess
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
from pytest_vmsandbox.catalogue.catalogue import own_folders
from pytest_vmsandbox.catalogue.definition import ImageDefinition
from pytest_vmsandbox.core.architecture import ARCHITECTURES, native_architecture
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.core.spec import MIB
from pytest_vmsandbox.core.text import printable

VARIABLE = "VMSANDBOX_HELPER"  # tells a recipe where the program is
COMPILERS = ("cc", "gcc", "clang")  # the first one that is here makes this machine's program
OPTIONS = ("-Os", "-static", "-s")
SUMS = "SHA256SUMS"  # beside the source: its digest, and those of the programs in the wheel
_PACKAGED = Path(__file__).resolve().parent.parent / "helpers"  # only in a wheel
_PROGRAM, _LIBRARY = "helper", "libc.a"
_LARGEST_SCRIPT = 4 * MIB
_SECONDS = 600.0  # for one compiler. Zig takes up to a minute where nothing else runs
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
            on_busy=lambda: say(f"waiting: another process makes the helper for {architecture}"),
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
    if not _is_native(architecture) or _has_zig():
        return ()
    compiler = _compiler()
    if compiler is None:
        return COMPILERS[0], _LIBRARY
    return () if _has_library(compiler) else (_LIBRARY,)


def is_named_by(definition: ImageDefinition, variable: str = VARIABLE) -> bool:
    """Whether a recipe, or a file that it uses, names a variable, such as that of the helper's path."""
    return bool(definition.recipe) and any(
        file.stat().st_size < _LARGEST_SCRIPT and variable.encode() in file.read_bytes()
        for _, file in definition.files()
    )


def helper_source() -> Path:
    """The source of the helper.

    Raises:
        ImageError: it is missing.
    """
    for folder in own_folders():
        if (source := folder / "helper" / "helper.c").is_file():
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
        self.say(f"making the helper for {self.architecture}")
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
        raise ImageError(
            f"the helper for guests of {self.architecture} cannot be made here",
            details="\n".join(failures),
            remedy=_remedy(self.architecture),
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
    return find_spec("ziglang") is not None


def _is_native(architecture: str) -> bool:
    """Whether a compiler of this machine makes programs for an architecture."""
    return sys.platform == "linux" and architecture == native_architecture()


def _compiler() -> str | None:
    return next(filter(None, map(programs.find, COMPILERS)), None)


def _has_library(compiler: str) -> bool:
    """Whether a compiler can link with the C library statically."""
    try:
        done = subprocess.run(
            [compiler, f"-print-file-name={_LIBRARY}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() != _LIBRARY  # otherwise, where it is


def zig(architecture: str) -> list[str]:
    """The start of a command line by which Zig compiles for an architecture."""
    return [sys.executable, "-m", "ziglang", "cc", "-target", ARCHITECTURES[architecture].zig]


def compiled(
    compiler: Sequence[str],
    architecture: str,
    source: Path,
    program: Path,
    work: Path,
    *inherited: int,
) -> str:
    """Make a static program.

    Args:
        compiler: the start of its command line.
        architecture: what the program is for.
        source, program: the files.
        work: a folder for temporary files. Those of Zig take megabytes.
        inherited: descriptors that the compiler inherits.

    Returns:
        Why that failed; empty if it did not.
    """
    places = ("TMPDIR", "ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    try:
        done = subprocess.run(
            [*compiler, *OPTIONS, "-o", program, source],
            cwd=work,
            env={**os.environ, "LC_ALL": "C.UTF-8", **dict.fromkeys(places, os.fspath(work))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode != 0:
        output = printable(done.stdout.decode(errors="replace")).strip()
        return output or f"it ended with status {done.returncode}"
    return "" if _is_for(architecture, program) else f"it made no program for {architecture}"


def _is_for(architecture: str, program: Path) -> bool:
    """Whether a program is one for an architecture, as its first bytes say."""
    with program.open("rb") as stream:
        head = stream.read(_MACHINE.stop)
    machine = head[_MACHINE]
    number = int.from_bytes(machine, "big" if head[5:6] == b"\2" else "little")
    return head[:4] == b"\x7fELF" and (*head[4:6], number) == ARCHITECTURES[architecture].elf


def _remedy(architecture: str) -> str:
    wheel = "install pytest-vmsandbox from a wheel, which has it"
    if _has_zig():
        return f"if the details name no cause, try again. Or {wheel}"
    other = f"{wheel}, or run 'pip install ziglang'"
    if not _is_native(architecture):
        return other
    packages = [programs.package_of(program) for program in (COMPILERS[0], _LIBRARY)]
    return f"{programs.install_line(packages)}. Or {other}"
