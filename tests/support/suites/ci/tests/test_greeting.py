"""A suite for two systems: a test that runs inside each, and one that drives them."""

import os

import greeting


def test_inside() -> None:
    image = os.environ["VMSANDBOX_GUEST"]
    assert greeting.system() == ("bookworm" if image.startswith("debian-12") else "trixie")


def test_from_here(vm) -> None:
    assert vm.run(["id", "-un"]).stdout == "root\n"
