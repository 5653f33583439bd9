"""Templates without guests, for tests of what is kept in the cache."""

import hashlib

from pytest_vmsandbox.guests.templates import TemplateStore


def add(cache, image, number=1, size=8192):
    """A sealed template of an image, as far as the cache is concerned."""
    store = TemplateStore(cache)
    key = hashlib.sha256(f"{image} {number}".encode()).hexdigest()
    with store.lock(key, lambda: None), store.incoming(key) as folder:
        (folder / "memory").write_bytes(b"m" * size)
        (folder / "state").write_bytes(b"s")
        (folder / "key").write_text("k")
        return store.adopt(folder, key, image=image, name=image, layers=[], disk="", facts={})
