"""Files that allure writes: they go to its folder on the host."""

from __future__ import annotations

import binascii
import os

from ..apart import keep_apart
from ..values import clean
from ..wire import Wire

keep_apart(globals())

MAX_FILE = 12 << 20  # bytes


def send_results(folder: str | None, wire: Wire) -> None:
    """Send what allure has written since, and remove it."""
    try:
        names = sorted(os.listdir(folder)) if folder else []
    except FileNotFoundError:  # allure is not here
        return
    for name in names:
        path = "%s/%s" % (folder, name)
        if os.stat(path).st_size > MAX_FILE:
            wire.note({"note": "result", "name": clean(name)})
        else:
            with open(path, "rb") as file:
                data = binascii.b2a_base64(file.read(), newline=False).decode()
            wire.note({"allure": clean(name), "data": data})
        os.unlink(path)
