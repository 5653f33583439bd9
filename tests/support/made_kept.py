"""Kept guests without guests, for tests of what is kept in the cache."""

from dataclasses import asdict

from pytest_vmsandbox.core.spec import Hardware
from pytest_vmsandbox.guests.kept import KeptStore, Moment, key_of


def add(cache, nodeid="tests/test_x.py::test_y[tiny]", *, guest="tiny-1", image="tiny", **others):
    """A kept guest of a test, as far as the cache and the command are concerned."""
    facts = {
        "saved_at": 1_790_000_000.0,
        "has_memory": True,
        "answers": True,
        "qemu": f"7.2.22 {'1' * 64}",
        "accelerator": "tcg",
    }
    facts |= {name: others.pop(name) for name in [*facts] if name in others}
    size, group = others.pop("size", 8192), others.pop("group", None)
    told = {"rootdir": "/home/you/project", "number": 1, "phase": "call", "outcome": "failed"}
    moment = Moment(nodeid=nodeid, **{**told, "error": "assert 1 == 2", **others})

    def fill(folder, _lock):
        (folder / "image").mkdir()
        (folder / "image" / "disk.raw").write_bytes(b"i" * 100)
        (folder / "state").write_bytes(b"s" * size)
        (folder / "disk0.0.qcow2").write_bytes(b"l")
        (folder / "key").write_text("k")
        hardware = asdict(Hardware(memory=1 << 28, user="root"))
        return {
            **facts,
            "moment": asdict(moment),
            "guest": guest,
            "image": image,
            "hardware": hardware,
            "kernel": None,
            "group": group,
            "layers": [["disk0.0.qcow2"]],
            "plugged": [],
            "tpm": [],
            "more_args": [],
        }

    return KeptStore(cache).make(key_of(moment), fill, on_busy=lambda: None, replace=True)
