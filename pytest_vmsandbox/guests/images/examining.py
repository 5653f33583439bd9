"""Finds out what a guest has, and compares that with what its definition says."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_vmsandbox.catalogue.definition import DEFINITION_FILE, PYTHON_FLOOR, ImageDefinition
from pytest_vmsandbox.core.errors import ImageError
from pytest_vmsandbox.guests.guest import Guest

_LOOK = """
for name in python3 python; do
    if command -v $name >/dev/null; then
        $name -c 'import sys; print("python=%d.%d.%d" % sys.version_info[:3])'
        break
    fi
done
if [ -d /run/systemd/system ]; then echo init=systemd
elif [ -d /run/openrc ] || [ -x /sbin/openrc ]; then echo init=openrc
elif case $(readlink /proc/1/exe) in *busybox*) ;; *) false ;; esac; then echo init=busybox
elif [ -f /etc/inittab ]; then echo init=sysvinit
fi
id -u "$1" >/dev/null 2>&1 && echo user=yes
:
"""
_PACKAGES = """
dpkg-query -W -f '${Package} ${Version}\\n' 2>/dev/null && exit
rpm -qa --queryformat '%{NAME} %{VERSION}-%{RELEASE}\\n' 2>/dev/null && exit
pacman -Q 2>/dev/null && exit
apk info -v 2>/dev/null | sed 's/-\\([^-]*-r[0-9]*\\)$/ \\1/'
"""


def packages(guest: Guest) -> str:
    """A line for each package that the guest's package manager knows, with its version; sorted."""
    lines = guest.shell(_PACKAGES, user="root", check=False).stdout.splitlines(keepends=True)
    return "".join(sorted(lines))


def check(guest: Guest, definition: ImageDefinition) -> Mapping[str, object]:
    """Check that a guest is as its definition says.

    Returns:
        What was found, for the record: its Python, its init, and whether it has our helper.

    Raises:
        ImageError: the definition says something else.
    """
    words = ["/bin/sh", "-c", _LOOK, "sh", definition.user]
    lines = guest.run(words, user="root").stdout.splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    python, init = found.get("python", ""), found.get("init", "")
    wrong = [
        _wrong_python(definition, python),
        f"system.init = {definition.init!r}, but the guest has {init}"
        if init and definition.init not in (init, "none")
        else "",
        f"system.user = {definition.user!r}, but the guest has no such user"
        if "user" not in found
        else "",
    ]
    if lines := [line for line in wrong if line]:
        raise ImageError(
            f"{definition.folder / DEFINITION_FILE} says what is not so",
            details="\n".join(lines),
            remedy="correct these keys",
        )
    return {"found": {"python": python, "init": init, "helper": guest.engine.has_helper}}


def _wrong_python(definition: ImageDefinition, found: str) -> str:
    """What is wrong with what a definition says about Python; empty if nothing is."""
    if not definition.python:
        return ""  # tests can be kept out of a guest that has it
    version = tuple(map(int, found.split("."))) if found else ()
    has = f"but the guest has Python {found}" if found else "but the guest has no Python"
    if stated := definition.python_version:
        parts = tuple(map(int, stated.split(".")))
        return f"system.python = {stated!r}, {has}" if version[: len(parts)] != parts else ""
    floor = ".".join(map(str, PYTHON_FLOOR))
    return f"system.python = true means {floor} or newer, {has}" if version < PYTHON_FLOOR else ""
