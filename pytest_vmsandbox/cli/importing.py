"""``vmsandbox images import`` and ``fetch``: images of files from elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pytest_vmsandbox.cache.files import locked, private_folder, remove_tree
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.definition import (
    INITS,
    ImageDefinition,
    check_name,
)
from pytest_vmsandbox.catalogue.origin import FORMATS, METHODS
from pytest_vmsandbox.catalogue.store import ImageStore
from pytest_vmsandbox.cli.options import image_path_option, offline_option
from pytest_vmsandbox.cli.project import joined, lock_here, project_options
from pytest_vmsandbox.cli.screen import Screen
from pytest_vmsandbox.core.architecture import ARCHITECTURES
from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.core.paths import cache_dir, imported_dir
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.core.spec import FIRMWARE

_FILE = click.Path(path_type=Path)


@click.command("import")
@click.argument("name")
@click.argument("files", nargs=-1, metavar="[FILE]...", type=_FILE)
@click.option(
    "--format", "format_", type=click.Choice(FORMATS), help="Format of FILE (default: detected)."
)
@click.option(
    "--firmware",
    type=click.Choice(FIRMWARE),
    help="What boots it (default: as the file says, or bios).",
)
@click.option(
    "--kernel", metavar="FILE", type=_FILE, help="A Linux kernel that is booted directly."
)
@click.option("--initrd", metavar="FILE", type=_FILE, help="The initial RAM disk for --kernel.")
@click.option("--append", metavar="TEXT", help="The command line for --kernel.")
@click.option("--login", type=click.Choice(METHODS), help="How the first login works.")
@click.option(
    "--login-user", metavar="NAME", help="Who logs in the first time (default: the user)."
)
@click.option("--password", metavar="TEXT", help="For --login=password.")
@click.option(
    "--ready", metavar="REGEX", help="For --login=none: the console shows it when it is up."
)
@click.option("--user", metavar="NAME", help="Who runs commands in the guest (default: root).")
@click.option(
    "--python", metavar="VERSION|no", help="The guest's Python, or no (default: 3.9 or newer)."
)
@click.option(
    "--init", type=click.Choice(INITS), help="The guest's init system (default: systemd)."
)
@click.option(
    "--architecture", type=click.Choice(tuple(ARCHITECTURES)), help="Default: that of this machine."
)
@click.option("--memory", metavar="SIZE", help="Memory that it needs to boot (default: 256MiB).")
@click.option("--description", metavar="TEXT", help="One line for people.")
@click.option(
    "--into",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the definition into this folder of images (default: into the cache).",
)
@click.option(
    "--dry-run", is_flag=True, help="Check the files and show what was found. Make nothing."
)
@image_path_option
def import_(
    *,
    name: str,
    files: tuple[Path, ...],
    into: Path | None,
    dry_run: bool,
    image_path: tuple[Path, ...],
    **options: Any,
) -> None:
    """Make an image of a disk that you have.

    FILE is a disk image (qcow2, raw, VMDK, VDI, VHDX or VHD; also compressed), an OVA or a box of
    Vagrant. For a split VMDK, give all of its files. With --kernel, a disk is not needed.

    The files are checked before anything uses them. The definition is written to NAME/image.toml, with
    the digest of the file, which stays where it is. 'vmsandbox images rm NAME' removes the image again,
    and the definition if it is in the cache.
    """
    from pytest_vmsandbox.catalogue.importing.describing import check_free, describe, write
    from pytest_vmsandbox.cli.building import build_one

    check_name(name, "import")
    cache = cache_dir()
    folder = (into or imported_dir(cache)).absolute() / name
    paths = image_path if into is None else tuple(dict.fromkeys((*image_path, into)))
    _check_new(name, joined(lock_here([])[1], image_path))
    check_free(folder)
    wishes = _wishes(name, files, options)
    screen = Screen()
    with screen.stages() as stage, _work_folder(name, stage) as work:
        stage("checking the files")
        described = describe(wishes, folder, cache, work, stage)
    for what, why in described.notes:
        screen.parts((f"  {what}", "bold"), (f"  ({why})", "dim"))
    if dry_run:
        return
    definition = write(described, folder)
    screen.say(f"wrote {definition.folder / 'image.toml'}")
    try:
        build_one(definition, Settings(image_path=paths))
    except VMSandboxError as error:
        error.add_note(
            f"The definition stays: {definition.folder / 'image.toml'}. Correct it and run 'vmsandbox images "
            f"build {name}', or remove it by 'vmsandbox images rm {name}'."
        )
        raise


@click.command
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--force", is_flag=True, help="Make images again even if they are made.")
@offline_option
@project_options
@image_path_option
def fetch(
    *,
    names: tuple[str, ...],
    force: bool,
    offline: bool,
    where: list[str],
    image_path: tuple[Path, ...],
) -> None:
    """Make images whose definitions name a file from elsewhere.

    What is downloaded is kept, so an image can be made again without the network. A NAME may be a glob.
    If the project here has a lock file, files must have the digests in it.
    """
    from pytest_vmsandbox.cli.building import build_each

    locked, folders = lock_here(where)
    settings = Settings(image_path=joined(folders, image_path), offline=offline)
    catalogue = Catalogue(settings.image_path)
    definitions = [catalogue.get(name) for name in catalogue.select(names)]
    sources = [definition for definition in definitions if definition.source is not None]
    if not sources:
        raise ConfigError(
            f"{', '.join(names)}: no definition with a [source]",
            remedy="make other images by 'vmsandbox images build'",
        )
    build_each(
        [definition.name for definition in sources], catalogue, settings, force=force, lock=locked
    )


def forget(name: str, catalogue: Catalogue) -> int:
    """Remove the definition of an image that was imported, and what was downloaded for an image.

    Definitions in a user's folders stay.

    Args:
        catalogue: as it was before. What another image in it needs stays, too.

    Returns:
        Bytes that were freed.

    Raises:
        TeardownError: something cannot be removed.
    """
    freed = 0
    used = {other: _files_of(definition) for other, definition in catalogue.valid(foreign=True)}
    if mine := used.pop(name, None):
        from pytest_vmsandbox.catalogue.importing.fetch import discard

        freed += discard(cache_dir(), mine, set().union(*used.values()))
    folder = imported_dir(cache_dir()) / name
    return freed + (remove_tree(folder) if folder.is_dir() else 0)


def _files_of(definition: ImageDefinition) -> set[str]:
    """The places and the digests of the files that an image is made of."""
    source = definition.source
    if source is None:
        return set()
    places = {source.url, source.kernel, source.initrd}
    digests = {source.sha256, source.sha512, source.kernel_sha256, source.initrd_sha256}
    return (places | digests) - {""}


@contextmanager
def _work_folder(name: str, say: Callable[[str], None]) -> Iterator[Path]:
    """A folder for what is unpacked. If we are killed, `clean` or the next import removes it."""
    from pytest_vmsandbox.catalogue.builder import LARGE_TMP

    store = ImageStore(cache_dir())
    lock = private_folder(store.root) / f"{name}.lock"
    base = Path(os.environ.get("TMPDIR") or LARGE_TMP)
    with locked(lock, on_busy=lambda: say(f"waiting: another process makes {name}")):
        try:
            with store.work_folder(name, base) as work:
                yield work
        finally:
            if not (store.root / name).exists():
                lock.unlink()  # a process that waits for it notices


def _check_new(name: str, image_path: tuple[Path, ...]) -> None:
    there = Catalogue(image_path).folder(name)
    if there is not None:
        is_imported = there.parent == imported_dir(cache_dir())
        removal = f", or remove it first: vmsandbox images rm {name}" if is_imported else ""
        raise ConfigError(
            f"there is an image {name!r} already",
            details=str(there),
            remedy=f"choose another name{removal}",
        )


def _check_together(options: dict[str, Any]) -> None:
    """Check options that need each other.

    Raises:
        ConfigError: one is missing, or one too many is there.
    """
    if options["kernel"] is None:
        loader = "for a disk with a boot loader of its own, use --firmware=uefi or --firmware=bios"
        needs = {
            "--initrd": (options["initrd"] is not None, "add --kernel=FILE"),
            "--append": (options["append"] is not None, f"add --kernel=FILE; {loader}"),
            "--firmware=kernel": (
                options["firmware"] == "kernel",
                f"add --kernel=FILE and --initrd=FILE; {loader}",
            ),
            "--login=key": (
                options["login"] == "key",
                "the key comes by the kernel's command line. Use another --login",
            ),
        }
        for option, (is_there, remedy) in needs.items():
            if is_there:
                raise ConfigError(f"{option} needs --kernel", remedy=remedy)
    elif options["firmware"] not in (None, "kernel"):
        raise ConfigError(
            f"--kernel cannot be used with --firmware={options['firmware']}",
            remedy="leave one of the two out",
        )


def _wishes(name: str, files: tuple[Path, ...], options: dict[str, Any]) -> Any:
    from pytest_vmsandbox.catalogue.importing.describing import Wishes

    if not files and options["kernel"] is None:
        raise ConfigError("no file is given", remedy="name the file of a disk, or --kernel=FILE")
    if urls := [str(file) for file in files if re.match(r"https?:/", str(file))]:
        raise ConfigError(
            f"{urls[0].replace(':/', '://', 1)} is no file of this machine",
            remedy="download it first; or write an image.toml with [source] url and sha256, and run "
            "'vmsandbox images fetch'",
        )
    _check_together(options)
    python = options["python"]
    system = {
        "python": {"yes": True, "no": False, "true": True, "false": False}.get(
            str(python).lower(), python
        ),
        "init": options["init"],
        "user": options["user"],
    }
    login = {
        "method": options["login"],
        "user": options["login_user"],
        "password": options["password"],
        "ready": options["ready"],
    }
    return Wishes(
        name=name,
        files=tuple(dict.fromkeys(files)),
        format=options["format_"] or "",
        firmware=options["firmware"] or "",
        kernel=options["kernel"],
        initrd=options["initrd"],
        append=options["append"],
        login={key: value for key, value in login.items() if value is not None},
        system={key: value for key, value in system.items() if value is not None},
        architecture=options["architecture"] or "",
        description=options["description"] or "",
        memory_min=options["memory"] or "",
    )
