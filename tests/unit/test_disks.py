"""The files of a guest's disks."""

from contextlib import ExitStack

from pytest_vmsandbox.machine.disk import Disks


def test_frozen_disks_outlive_their_guest(tmp_path):
    base, layer = tmp_path / "base", tmp_path / "layer"
    base.write_bytes(b"base")
    layer.write_bytes(b"layer")
    with ExitStack() as stack:
        with base.open("rb") as first, layer.open("rb") as second:
            disks = Disks(base=first, overlays=((second,),), sizes=(4,)).frozen(stack)
        assert disks.base is not None
        assert (disks.base.read(), disks.overlays[0][0].read()) == (b"base", b"layer")
    assert disks.base.closed
