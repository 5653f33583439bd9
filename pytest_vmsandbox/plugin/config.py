"""Our options and ini keys, and how we read them."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.paths import lock_file
from pytest_vmsandbox.core.settings import (
    ACCELERATORS,
    DEFAULT_IMAGE,
    ISOLATIONS,
    Isolation,
    Settings,
)
from pytest_vmsandbox.core.spec import Hardware, parse_kernel, parse_size

MISSING = ("error", "skip")
KEEP = ("none", "failed", "all")
_KEEP_SIZE = "8GiB"
Choice = TypeVar("Choice", bound=str)
_TEST_SECONDS = 600.0
_MOST_SECONDS = 86_400
_MOST_REPETITIONS = 10_000
_IMAGE_PATH = pytest.StashKey[tuple[Path, ...]]()
_HARDWARE_KEYS = ("cpus", "memory", "disk", "network", "user")

# Name, type and help of each ini key. «Like --X» says which option it belongs to.
_INI: tuple[tuple[str, Any, str], ...] = (
    ("vm_images", "args", "like --vm"),
    ("vm_kernel", "args", "like --vm-kernel, relative to the rootdir"),
    ("vm_accel", None, "like --vm-accel"),
    ("vm_missing", None, "like --vm-missing"),
    ("vm_inside", "bool", "like --in-vm"),
    ("vm_isolation", None, "like --vm-isolation"),
    ("vm_offline", "bool", "like --vm-offline"),
    ("vm_keep", None, "like --vm-keep"),
    ("vm_keep_size", None, ("room for kept guests on the disk (default: 8GiB). When it is used up, the oldest "
     "are removed")),
    ("vm_artifacts_dir", None, "like --vm-artifacts, relative to the rootdir"),
    ("vm_pcap", "bool", "like --vm-pcap"),
    ("vm_boot_timeout", None, "like --vm-boot-timeout"),
    ("vm_image_path", "paths", "folders with image definitions of your own"),
    ("vm_command_timeout", None, ("seconds for a command that names no timeout, under KVM (default: 60); "
     "longer under emulation")),
    ("vm_test_timeout", None, ("seconds for a test inside a guest, under KVM (default: 600); longer under "
     "emulation")),
    ("vm_push", "args", ("files and folders to copy to guests although git ignores them, or they lie "
     "outside of the rootdir")),
    ("vm_pull", "args", ("files that tests inside guests write and that are copied back: globs, relative "
     "to the rootdir; '!' excludes")),
    ("vm_requirements", "linelist", ("what to install for tests inside guests: a requirement, a file of "
     "requirements, group:NAME, extra:NAME, or '.', which is what the project needs (default: what this "
     "environment has)")),
    ("vm_guest_plugins", "args", ("the pytest plugins to load for tests inside guests, by module or entry "
     "point (default: those that are loaded here, as far as the guest has them)")),
    ("vm_env", "linelist", "environment variables of tests inside guests: NAME or NAME=VALUE"),
    ("vm_cpus", None, "CPUs of a guest (default: 1)"),
    ("vm_memory", None, "memory of a guest (default: 512MiB)"),
    ("vm_disk", None, "size of a guest's root disk (default: the image's)"),
    ("vm_network", None, ("network of a guest: isolated (the default), nat, or the hosts and "
     "ports that it may reach")),
    ("vm_user", None, "who runs commands in a guest (default: the image's user)"),
)  # fmt: skip


def add_options(parser: pytest.Parser) -> None:
    """Register everything. Defaults are None, so that an ini key counts where no option is given.

    The reference in docs/ is generated from what is registered here.
    """
    group = parser.getgroup("vmsandbox", "virtual machines (pytest-vmsandbox)")
    _add_guests(group)
    group.addoption(
        "--vm-missing",
        choices=MISSING,
        help="if QEMU or an image is missing, the test is an error (the default) or is skipped",
    )
    group.addoption(
        "--in-vm",
        action="store_true",
        default=None,
        help="run all tests inside guests, except those that drive a guest. Ini key: vm_inside",
    )
    group.addoption(
        "--vm-isolation",
        choices=ISOLATIONS,
        help="which tests inside guests share one: none, those of a module, or all (default: session)",
    )
    group.addoption("--vm-offline", action="store_true", default=None, help="never use the network")
    group.addoption(
        "--vm-keep",
        choices=KEEP,
        help="whose guests to keep: those of no test (the default), of tests that fail, or of all tests. They "
        "are saved at the moment of the failure, and the summary shows how to enter them",
    )
    group.addoption(
        "--vm-record",
        action="store_true",
        default=None,
        help="experimental: record each test inside a guest, and keep the runs that fail for 'vmsandbox replay'. "
        "Emulated only. Each test has a guest of its own",
    )
    group.addoption(
        "--vm-artifacts",
        metavar="DIR",
        help="folder for the artifacts of failed tests (default: beside pytest's temporary folders)",
    )
    group.addoption(
        "--vm-pcap",
        action="store_true",
        default=None,
        help="capture each guest's network, and keep network.pcap among the artifacts of failed tests "
        "(up to 256 MiB)",
    )
    group.addoption(
        "--vm-boot-timeout",
        metavar="SECONDS",
        help="for a boot under KVM (default: 60); ten times as long under emulation",
    )
    _add_hunting(group)
    for key, kind, about in _INI:
        parser.addini(key, about, type=kind, default=None)


def _add_hunting(group: pytest.OptionGroup) -> None:
    """Register the options that find tests which fail now and then. They are for one run, so no ini keys."""
    group.addoption(
        "--vm-repeat",
        type=_count,
        metavar="N",
        help="run each selected test N times (at most 10000), each time in a fresh guest if it needs one, and show "
        "how often it fails",
    )
    group.addoption(
        "--vm-noise",
        action="store_true",
        default=None,
        help="disturb guests while tests run: their QEMU is paused for 2 of every 20 ms, so that tests with "
        "short timeouts fail more often",
    )


def _count(text: str) -> int:
    """The number of `--vm-repeat`."""
    if not text.isdecimal() or not 0 < int(text) <= _MOST_REPETITIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is invalid: use a whole number from 1 to {_MOST_REPETITIONS}"
        )
    return int(text)


def _add_guests(group: pytest.OptionGroup) -> None:
    """Register the options that say what guests are."""
    group.addoption(
        "--vm",
        action="append",
        metavar="NAME",
        help="image to run on (default: debian-13); repeatable; takes globs; '!' in front excludes; "
        "'all' stands for all images of this machine's architecture. Ini key: vm_images",
    )
    group.addoption(
        "--vm-list",
        action="store_true",
        help="list the images with their state and size, then exit",
    )
    group.addoption(
        "--vm-kernel",
        action="append",
        metavar="PATH",
        help="kernel to boot instead of the image's own: its file, the folder in which you built it, a "
        "folder with boot/vmlinuz-VERSION and lib/modules, or a .deb file; repeatable; 'image' stands for the "
        "image's own. Ini key: vm_kernel",
    )
    group.addoption(
        "--vm-accel",
        choices=ACCELERATORS,
        help="how guests run; auto (the default) takes the best accelerator that is proven to run a "
        "kernel on this machine",
    )


def settings(config: pytest.Config) -> Settings:
    """The settings of this run.

    Raises:
        pytest.UsageError: a value is invalid; the text names the key and what is allowed.
    """
    try:
        lock = lock_file(config.rootpath)
        return Settings(image_path=image_path(config), lock=lock, **_values(config))
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def _values(config: pytest.Config) -> dict[str, Any]:
    """Settings that are plain values, without those that are not set."""
    values: dict[str, Any] = {
        "hardware": hardware(config),
        "accelerator": _choice(config, "--vm-accel", "vm_accel", ACCELERATORS),
        "boot_timeout": _seconds(config, "vm_boot_timeout", "--vm-boot-timeout"),
        "command_timeout": _seconds(config, "vm_command_timeout"),
        "offline": offline(config),
        "captures": bool(_ini(config, "vm_pcap") or config.getoption("--vm-pcap")),
    }
    return {name: value for name, value in values.items() if value is not None}


def hardware(config: pytest.Config) -> Hardware:
    """The default hardware of guests.

    Raises:
        pytest.UsageError: a value is invalid.
    """
    arguments = {name: _ini(config, f"vm_{name}") for name in _HARDWARE_KEYS}
    try:
        default = Hardware().changed(arguments)
    except ConfigError as error:
        raise pytest.UsageError(f"in the ini file: vm_{error}") from error
    try:
        return replace(default, kernel=kernels(config)[0])
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def kernels(config: pytest.Config) -> tuple[Path | None, ...]:
    """The kernels of this run, at least one; None is the image's own.

    Raises:
        ConfigError: a value is invalid.
    """
    given, folder = config.getoption("--vm-kernel"), config.invocation_params.dir
    if not given:
        given, folder = entries(config, "vm_kernel"), config.rootpath
    return tuple(dict.fromkeys(parse_kernel(value, folder) for value in given)) or (None,)


def share(config: pytest.Config, count: int) -> int:
    """How many of `count` tests this process runs, if it is one of several workers of xdist."""
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    return -(-count // workers)


def check_values(config: pytest.Config) -> None:
    """Read all values, so that an invalid value is an error in every run.

    Raises:
        pytest.UsageError: a value is invalid.
    """
    _values(config)
    skip_missing(config)
    inside(config)
    isolation(config)
    keep(config)
    keep_size(config)
    test_timeout(config)
    guest_environment(config)
    artifacts_dir(config)


def check_places(config: pytest.Config) -> None:
    """Check the folders that guests need on this machine, and the lock file, before the first test.

    Raises:
        pytest.UsageError: a folder cannot be used, or the lock file cannot be read.
    """
    settings(config)
    if (lock := lock_file(config.rootpath)) is not None:
        from pytest_vmsandbox.catalogue.lock import Lock

        try:
            Lock.read(lock)
        except ConfigError as error:
            raise pytest.UsageError(str(error)) from error
    if (folder := artifacts_dir(config)) is not None:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        try:  # checking permissions is not enough: root passes, but cannot make a file in /proc
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise pytest.UsageError(
                f"artifacts cannot be kept in {folder}: {there} is not a folder that you can write to\n"
                "Remedy: name another folder: --vm-artifacts, or vm_artifacts_dir in the ini file"
            ) from error


def image_path(config: pytest.Config) -> tuple[Path, ...]:
    """Folders with image definitions, from the ini key and from the hook, which is called once.

    Raises:
        ConfigError: the hook returned something else.
    """
    if _IMAGE_PATH not in config.stash:
        folders = list(map(Path, entries(config, "vm_image_path")))
        for returned in reversed(config.hook.pytest_vmsandbox_images(config=config)):
            # A text is a sequence, too: of one-letter folders.
            if isinstance(returned, str) or not isinstance(returned, Iterable):
                raise ConfigError(
                    f"pytest_vmsandbox_images returned {returned!r}, which is no list of folders",
                    remedy="return a list, such as [pathlib.Path(__file__).with_name('images')]",
                )
            folders += [config.rootpath / folder for folder in returned]
        config.stash[_IMAGE_PATH] = tuple(folders)
    return config.stash[_IMAGE_PATH]


def selected_patterns(config: pytest.Config) -> tuple[list[str], bool]:
    """The patterns of the selected images, and whether they come from the command line."""
    if patterns := config.getoption("--vm"):
        return list(patterns), True
    return entries(config, "vm_images") or [DEFAULT_IMAGE], False


def which_guest(config: pytest.Config) -> list[str]:
    """The options of the command line that decide where a test runs, in order to repeat them."""
    isolation = config.getoption("--vm-isolation")
    return [
        *(f"--vm={pattern}" for pattern in config.getoption("--vm") or ()),
        *(f"--vm-kernel={kernel}" for kernel in config.getoption("--vm-kernel") or ()),
        *(["--in-vm"] if config.getoption("--in-vm") else []),
        *(["--vm-record"] if record(config) else []),
        *([f"--vm-isolation={isolation}"] if isolation else []),
        *([f"--vm-repeat={count}"] if (count := repetitions(config)) else []),
        *(["--vm-noise"] if config.getoption("--vm-noise") else []),
    ]


def skip_missing(config: pytest.Config) -> bool:
    """Whether a missing QEMU or image skips a test instead of being an error."""
    return _choice(config, "--vm-missing", "vm_missing", MISSING) == "skip"


def inside(config: pytest.Config) -> bool:
    """Whether tests without a marker run inside guests."""
    return bool(_ini(config, "vm_inside") or config.getoption("--in-vm"))


def isolation(config: pytest.Config) -> Isolation:
    """Which tests inside share a guest."""
    return _choice(config, "--vm-isolation", "vm_isolation", ISOLATIONS) or "session"


def repetitions(config: pytest.Config) -> int:
    """How many times each test runs, if `--vm-repeat` says so; else 0."""
    return config.getoption("--vm-repeat") or 0


def record(config: pytest.Config) -> bool:
    """Whether tests inside are recorded."""
    return bool(config.getoption("--vm-record"))


def keep(config: pytest.Config) -> str | None:
    """Whose guests are kept, one of `KEEP`; None if nobody has said it."""
    return _choice(config, "--vm-keep", "vm_keep", KEEP)


def keep_size(config: pytest.Config) -> int:
    """The room for kept guests, in bytes.

    Raises:
        pytest.UsageError: the value is invalid.
    """
    try:
        return parse_size(_ini(config, "vm_keep_size") or _KEEP_SIZE, "vm_keep_size")
    except ConfigError as error:
        raise pytest.UsageError(f"in the ini file: {error}") from error


def offline(config: pytest.Config) -> bool:
    """Whether the run must not use the network."""
    return bool(_ini(config, "vm_offline") or config.getoption("--vm-offline"))


def test_timeout(config: pytest.Config) -> float:
    """The timeout of a test inside a guest, in seconds, on real hardware."""
    return _seconds(config, "vm_test_timeout") or _TEST_SECONDS


def entries(config: pytest.Config, key: str) -> list[str]:
    """The entries of an ini key that takes several; none if it is not set."""
    return list(_ini(config, key) or ())


def guest_environment(config: pytest.Config) -> dict[str, str]:
    """The environment of tests inside: the variables that `vm_env` names, and CI, which pytest reads.

    Raises:
        pytest.UsageError: a line names no variable.
    """
    found: dict[str, str | None] = {"CI": os.environ.get("CI")}
    for line in entries(config, "vm_env"):
        name, given, value = line.partition("=")
        name = name.strip()
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise pytest.UsageError(
                f"vm_env: {line!r} names no environment variable\nRemedy: write NAME or NAME=VALUE"
            )
        found[name] = value.strip() if given else os.environ.get(name, found.get(name))
    return {name: value for name, value in found.items() if value is not None}


def artifacts_dir(config: pytest.Config) -> Path | None:
    """The folder for artifacts of failed tests, if the user names one.

    Raises:
        pytest.UsageError: the name is empty.
    """
    if (option := config.getoption("--vm-artifacts")) is not None:
        if not option:
            raise pytest.UsageError(
                "--vm-artifacts='' names no folder\nRemedy: name a folder, or leave the option out"
            )
        return Path(config.invocation_params.dir, option)
    if ini := _ini(config, "vm_artifacts_dir"):
        return Path(config.rootpath, ini)
    return None


def _ini(config: pytest.Config, key: str) -> Any:
    try:
        return config.getini(key) or None
    except (ValueError, pytest.UsageError) as error:  # the message does not name the key
        raise pytest.UsageError(f"{key}: {error}") from error


def _choice(
    config: pytest.Config, option: str, key: str, allowed: tuple[Choice, ...]
) -> Choice | None:
    value: Choice | None = config.getoption(option) or _ini(config, key)
    if value is not None and value not in allowed:
        raise pytest.UsageError(
            f"{key} = {value!r} is invalid\nRemedy: use one of {', '.join(allowed)}"
        )
    return value


def _seconds(config: pytest.Config, key: str, option: str = "") -> float | None:
    """The timeout from an option or an ini key; None if neither is set."""
    name, value = option, config.getoption(option) if option else None
    if value is None:
        name, value = key, _ini(config, key)
    if value is None:
        return None
    with suppress(ValueError):
        value = float(value)
    try:
        return seconds(value, name)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def seconds(value: object, name: str) -> float:
    """A timeout as users write it.

    Raises:
        ConfigError: it is not a number of seconds, or out of range.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= _MOST_SECONDS:  # type: ignore[operator]
        raise ConfigError(
            f"{name}={value!r} is not a positive number of seconds",
            remedy=f"use more than 0 and at most {_MOST_SECONDS} (a day)",
        )
    return float(value)  # type: ignore[arg-type]
