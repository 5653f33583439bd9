"""Where an image comes from: another image, or files from elsewhere; and the first login into it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from pytest_vmsandbox.catalogue.tables import Table, line, texts
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import NETWORKS, Firmware, Hardware, Network

Format = Literal["qcow2", "raw", "vmdk", "vdi", "vhdx", "vpc", "ova", "box"]
Method = Literal["key", "cloud-init", "vagrant", "password", "none"]
FORMATS: tuple[Format, ...] = get_args(Format)
METHODS: tuple[Method, ...] = get_args(Method)
ADOPTED: tuple[Method, ...] = ("cloud-init", "vagrant", "password")  # we log in once, and add a key

_PLACE = (
    "an http(s) URL, or a path relative to this folder. 'vmsandbox images import' takes a file from "
    "anywhere"
)
_SHA256, _SHA512 = 64, 128  # hexadecimal digits


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What a derived image adds to its base.

    Attributes:
        packages: for the guest's own package manager.
        script: a file in the definition's folder that runs as root in the guest afterwards; or empty.
        network: the guest's network meanwhile.
    """

    packages: tuple[str, ...] = ()
    script: str = ""
    network: Network = "isolated"

    @classmethod
    def read(cls, top: Table) -> Addition | None:
        """What a definition adds to its base; None without a base.

        Raises:
            ConfigError: a value is not allowed.
        """
        top.only("add", "from" in top, "without a base", "name the base with 'from'")
        if "from" not in top:
            return None
        table = top.table("add", ("packages", "script", "network"))
        none: tuple[str, ...] = ()
        packages = table.read("packages", "a list of names of packages", _packages, none)
        script = partial(_file, top.file.parent)
        return cls(
            packages=packages,
            script=table.read("script", "the name of a file in this folder", script, ""),
            network=table.choice("network", NETWORKS, "nat" if packages else "isolated"),
        )


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the files of an image come from. Each value is empty if there is nothing to say.

    Attributes:
        url: of the disk or archive: http(s), or a path relative to the definition's folder.
        sha256: of the file at `url`, in small hexadecimal digits.
        sha512: likewise. At most one of the two is there.
        checksums: URL or path of a list of digests, if neither is there.
        keyring: a file in the definition's folder with the public keys that sign that list.
        signature: URL or path of its signature; empty for a clear-signed list.
        format: one of `FORMATS`.
        kernel: URL or path of a Linux kernel.
        kernel_sha256: its digest.
        initrd: URL or path of the initial RAM disk for that kernel.
        initrd_sha256: its digest.
    """

    url: str = ""
    sha256: str = ""
    sha512: str = ""
    checksums: str = ""
    keyring: str = ""
    signature: str = ""
    format: Format | Literal[""] = ""
    kernel: str = ""
    kernel_sha256: str = ""
    initrd: str = ""
    initrd_sha256: str = ""

    @classmethod
    def read(cls, top: Table) -> Source | None:
        """The source that a definition names; None if it has another origin.

        Raises:
            ConfigError: a value is missing, or not allowed.
        """
        if "source" not in top:
            return None
        table = top.table("source", tuple(cls.__annotations__))
        if "url" not in table and "kernel" not in table:
            raise table.missing("url", "name a disk (url), or a kernel (kernel, initrd), or both")
        for key in ("sha256", "sha512", "checksums", "format"):
            table.only(key, "url" in table, "without source.url", "name the disk by source.url")
        table.only(
            "keyring", "checksums" in table, "without source.checksums", "name a list of digests"
        )
        table.only(
            "signature", "keyring" in table, "without source.keyring", "name the keys that sign it"
        )
        table.only("initrd", "kernel" in table, "without source.kernel", "name its kernel")
        for key in ("kernel", "initrd"):
            digest = f"{key}_sha256"
            table.only(digest, key in table, f"without source.{key}", f"name the {key}")
            if key in table and digest not in table:
                raise table.missing(digest, "add the digest of the file: sha256sum FILE prints it")
        disk_format: Format | Literal[""] = ""
        if "url" in table:
            disk_format = table.choice("format", FORMATS)
            _check_one_digest(table)
        place, sha256, sha512 = _place, partial(_digits, _SHA256), partial(_digits, _SHA512)
        return cls(
            url=table.read("url", _PLACE, place, ""),
            sha256=table.read("sha256", f"{_SHA256} hexadecimal digits", sha256, ""),
            sha512=table.read("sha512", f"{_SHA512} hexadecimal digits", sha512, ""),
            checksums=table.read("checksums", _PLACE, place, ""),
            keyring=table.read(
                "keyring", "the name of a file in this folder", partial(_file, top.file.parent), ""
            ),
            signature=table.read("signature", _PLACE, place, ""),
            format=disk_format,
            kernel=table.read("kernel", _PLACE, place, ""),
            kernel_sha256=table.read("kernel_sha256", f"{_SHA256} hexadecimal digits", sha256, ""),
            initrd=table.read("initrd", _PLACE, place, ""),
            initrd_sha256=table.read("initrd_sha256", f"{_SHA256} hexadecimal digits", sha256, ""),
        )


def _check_one_digest(table: Table) -> None:
    digests = [key for key in ("sha256", "sha512", "checksums") if key in table]
    if not digests:
        raise table.missing(
            "sha256",
            "add sha256 or sha512, the digest of the file (sha256sum FILE prints it), or checksums, "
            "the URL of a list of digests",
        )
    first, last = f"source.{digests[0]}", digests[-1]
    table.only(last, len(digests) == 1, f"together with {first}", f"remove {first}")


@dataclass(frozen=True, kw_only=True)
class Login:
    """How the first login into an image works.

    Attributes:
        method: one of `METHODS`. With ``key``, the guest takes our key from the kernel's command line.
        user: who logs in; empty for the image's user.
        password: for the method ``password``.
        ready: for the method ``none``: a regular expression for the console of a system that is up.
    """

    method: Method = "key"
    user: str = ""
    password: str = ""
    ready: str = ""

    @classmethod
    def read(cls, top: Table, source: Source | None, firmware: Firmware, *, disk: bool) -> Login:
        """The login of an image that is not derived.

        Args:
            top: its definition.
            source: where its files come from.
            firmware: what boots it.
            disk: whether it has a disk.

        Raises:
            ConfigError: a value is missing, not allowed, or of no use with the others.
        """
        table = top.table("login", tuple(cls.__annotations__))
        default: Method | None = "key" if firmware == "kernel" else None
        if source is not None and source.format == "box":
            default = "vagrant"
        method = (
            table.choice("method", METHODS)
            if default is None
            else table.choice("method", METHODS, default)
        )
        _check_method(table, method, firmware, disk=disk)
        with_password, with_none = 'set login.method = "password"', 'set login.method = "none"'
        table.only("password", method == "password", f"with the method {method!r}", with_password)
        table.only("ready", method == "none", f"with the method {method!r}", with_none)
        nobody = method == "none" or (source is None and method == "key")
        table.only(
            "user", not nobody, f"with the method {method!r}: nobody logs in", "change login.method"
        )
        user, regex = "the name of a user", "a regular expression, such as 'login: $'"
        return cls(
            method=method,
            user=table.read("user", user, partial(hardware, "user"), ""),
            password=(
                table.read("password", "one line of text", line) if method == "password" else ""
            ),
            ready=table.read("ready", regex, _regex) if method == "none" else "",
        )


def _check_method(table: Table, method: Method, firmware: Firmware, *, disk: bool) -> None:
    if method == "key" and firmware != "kernel":
        why, others = f"with boot.firmware = {firmware!r}", (*ADOPTED, "none")
        because = "there is no kernel's command line that could hold a key"
    elif method in ADOPTED and not disk:
        why, others = "without a disk", ("key", "none")
        because = "what the first login changes would be lost"
    else:
        return
    raise ConfigError(
        f"{table.file}: login.method = {method!r} cannot be used {why}",
        details=because,
        remedy=f"use {' or '.join(map(repr, others))}",
    )


def hardware(name: str, value: object) -> Any:
    """`value` as the attribute `name` of `Hardware`; None if it is invalid."""
    try:
        return getattr(Hardware().changed({name: value}), name)
    except ConfigError:
        return None


def _file(folder: Path, value: object) -> str | None:
    name = line(value)
    return name if name and Path(name).name == name and (folder / name).is_file() else None


def _packages(value: object) -> tuple[str, ...] | None:
    """A package may have a version, an architecture or a group's sign, but never look like an option."""
    return texts(value, lambda name: re.fullmatch(r"[A-Za-z0-9@][\w.+:=~/@-]*", name) is not None)


def _place(value: object) -> str | None:
    place = line(value)
    if place is None or place != place.strip():
        return None
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", place)
    if scheme is None:
        return place if not place.startswith("/") else None
    return place if re.match(r"(?i)https?://[^/\s]+/\S", place) and " " not in place else None


def _digits(length: int, value: object) -> str | None:
    digits = value.lower() if isinstance(value, str) else ""
    return digits if re.fullmatch(rf"[0-9a-f]{{{length}}}", digits) else None


def _regex(value: object) -> str | None:
    text = line(value)
    try:
        re.compile(text or "")
    except (re.error, OverflowError, RecursionError):
        return None
    return text
