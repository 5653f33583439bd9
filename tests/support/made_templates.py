"""Templates without guests, for tests of what is kept in the cache."""

import hashlib

from pytest_vmsandbox.guests.templates import TemplateStore


def add(cache, image, number=1, size=8192):
    """A template of an image, as far as the cache is concerned."""
    key = hashlib.sha256(f"{image} {number}".encode()).hexdigest()

    def fill(folder, _lock):
        (folder / "memory").write_bytes(b"m" * size)
        (folder / "state").write_bytes(b"s")
        (folder / "key").write_text("k")
        return {"image": image, "name": image, "layers": [], "disk": "", "facts": {}}

    return TemplateStore(cache).make(key, fill, on_busy=lambda: None)
