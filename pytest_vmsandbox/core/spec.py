"""The hardware of a guest as frozen values, and how we read what users write."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pytest_vmsandbox.core import allowed
from pytest_vmsandbox.core.errors import ConfigError

KIB, MIB, GIB, TIB = 1024, 1024**2, 1024**3, 1024**4
_UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
Network = str  # one of NETWORKS, or the text of a list
NetworkArgument = str | Iterable[str]  # as users write it
Firmware = Literal["kernel", "uefi", "bios"]
NETWORKS = ("isolated", "nat")
OWN_KERNEL = "image"  # what users write for the kernel of the image
FIRMWARE: tuple[Firmware, ...] = get_args(Firmware)
_T = TypeVar("_T")


def parse_size(value: object, what: str) -> int:
    """The number of bytes in a size such as ``"512MiB"``.

    Args:
        value: a positive number and one of the units KiB, MiB, GiB, TiB.
        what: the name of the argument, for the error.

    Raises:
        ConfigError: `value` is not such a size.

    Example:
        >>> parse_size("1.5GiB", "memory")
        1610612736
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB)\s*", value)
        if match and (size := int(float(match[1]) * _UNITS[match[2]])) > 0:
            return size
    raise ConfigError(
        f"{what}={value!r} is not a size",
        remedy="write a number and a unit, such as '512MiB' or '2GiB' (KiB, MiB, GiB, TiB)",
    )


def format_size(size: float) -> str:
    """`size` bytes for people, in the largest unit that leaves a number of at least 1.

    Example:
        >>> format_size(512 * 1024**2)
        '512MiB'
        >>> format_size(1610612736)
        '1.5GiB'
    """
    for unit, factor in reversed(_UNITS.items()):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return f"{size:.0f}B"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware of a guest.

    Attributes:
        cpus: the number of CPUs, at least 1.
        memory: bytes.
        disk: bytes of the root disk; None for the size that the image has.
        disks: bytes of each further, blank disk, in order.
        network: ``isolated`` (nothing but what `Guest.forward` opens), ``nat``, or hosts and ports that the
            guest may reach, as one text.
        user: who runs commands in the guest if a call names nobody; empty for the image's user.
        kernel: the absolute path of another kernel than the image's: its file, a folder or a package;
            None for the image's own.
        firmware: what boots the guest: ``kernel`` (QEMU itself, without a boot loader), ``uefi`` or
            ``bios``; None for what the image says.
        tpm: whether the guest has a TPM 2.0; None for what the image says.
        recorded: whether what runs in it can be recorded and repeated. Users cannot ask for it here.
    """

    cpus: int = 1
    memory: int = 512 * MIB
    disk: int | None = None
    disks: tuple[int, ...] = ()
    network: Network = "isolated"
    user: str = ""
    kernel: Path | None = None
    firmware: Firmware | None = None
    tpm: bool | None = None
    recorded: bool = False

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Hardware:
        """Hardware that was written down as JSON, with `dataclasses.asdict`."""
        kernel = record["kernel"]
        path = None if kernel is None else Path(kernel)
        return cls(**{**record, "kernel": path, "disks": tuple(record["disks"])})

    def changed(self, arguments: Mapping[str, object]) -> Hardware:
        """This hardware with some arguments changed.

        Args:
            arguments: sizes are strings with a unit. None changes nothing.

        Raises:
            ConfigError: an argument is unknown, or its value is invalid.

        Example:
            >>> Hardware().changed({"cpus": 2, "memory": "1GiB"}).cpus
            2
        """
        values: dict[str, object] = {}
        for name, value in arguments.items():
            if name not in _READERS:
                raise ConfigError(
                    f"there is no hardware called {name!r}",
                    remedy=f"use one of {', '.join(_READERS)}",
                )
            if value is not None:
                values[name] = _READERS[name](value)
        return replace(self, **values)  # type: ignore[arg-type]


def _cpus(value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or not 1 <= int(text) <= 255:
        raise ConfigError(f"cpus={value!r} is not a number of CPUs", remedy="use 1 to 255")
    return int(text)


def _disks(value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(
            f"disks={value!r} is not a list of sizes", remedy="write a list, such as disks=['1GiB']"
        )
    sizes = tuple(parse_size(size, "disks") for size in value)
    if len(sizes) > MAX_DISKS:
        raise ConfigError(f"{len(sizes)} disks are too many", remedy=f"use at most {MAX_DISKS}")
    return sizes


def parse_network(value: object) -> Network:
    """The name of a network, or what it allows.

    Args:
        value: a name; or hosts and ports, as a list or as words of a text.

    Raises:
        ConfigError: there is no network with that name, or a host and port are invalid.

    Example:
        >>> parse_network(["example.org:443", "deb.example.org:80"])
        'deb.example.org:80 example.org:443'
    """
    if isinstance(value, str):
        words = value.replace(",", " ").split()
        if not any(":" in word for word in words):
            if value in NETWORKS:
                return value
            raise ConfigError(
                f"network={value!r} is unknown",
                remedy="use 'isolated', 'nat', or a list of what the guest may reach, such as "
                "['example.org:443']",
            )
        return allowed.canonical(words)
    if not isinstance(value, Iterable):
        raise ConfigError(
            f"network={value!r} is no network",
            remedy="use 'isolated', 'nat' or a list of hosts and ports",
        )
    return allowed.canonical(value)


def one_of(choices: Sequence[_T], value: object, what: str) -> _T:
    """The member of `choices` that equals `value`.

    Args:
        what: the name of the setting, for the error.

    Raises:
        ConfigError: no choice equals `value`.
    """
    for choice in choices:
        if value == choice:
            return choice
    raise ConfigError(
        f"{what}={value!r} is unknown", remedy=f"use {' or '.join(map(repr, choices))}"
    )


def _user(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*\$?", value):
        raise ConfigError(
            f"user={value!r} is not a user name",
            remedy="use letters, digits, '.', '_' and '-', such as 'tester'",
        )
    return value


def parse_kernel(value: object, folder: Path | None = None) -> Path | None:
    """The absolute path of a kernel; None for the image's own.

    Args:
        value: a path, or ``image``.
        folder: what a relative path is relative to; None for the current folder.

    Raises:
        ConfigError: `value` is no path.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(
            f"kernel={value!r} is not the path of a kernel",
            remedy=f"name a kernel, the folder in which you built one, a folder with boot/vmlinuz-*, a .deb "
            f"file, or {OWN_KERNEL!r} for that of the image",
        )
    if value == OWN_KERNEL:
        return None
    path = Path(os.fspath(value))
    with suppress(RuntimeError):  # there is no such user, so it is the name of a folder
        path = path.expanduser()
    return Path(folder or "", path).absolute()


def _tpm(value: object) -> bool:
    return one_of((True, False), value, "tpm")


MAX_DISKS = 8
_READERS: Mapping[str, Callable[[object], object]] = {
    "cpus": _cpus,
    "memory": partial(parse_size, what="memory"),
    "disk": partial(parse_size, what="disk"),
    "disks": _disks,
    "network": parse_network,
    "user": _user,
    "kernel": parse_kernel,
    "firmware": partial(one_of, FIRMWARE, what="firmware"),
    "tpm": _tpm,
}
HARDWARE_NAMES = tuple(_READERS)
