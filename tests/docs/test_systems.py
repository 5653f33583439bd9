"""The page of systems has each image that comes with us, and each architecture."""

from __future__ import annotations

import re
from pathlib import Path

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.catalogue.own import own_folders
from pytest_vmsandbox.core.architecture import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs/how-to/systems.md"


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without backquotes."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = section.partition("\n| --- ")[2].partition("\n")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_each_image_of_ours():
    catalogue = Catalogue()
    ours = [
        definition
        for definition in map(catalogue.get, catalogue.names())
        if definition.folder.parent in own_folders()
    ]
    found: dict[str, tuple[str, bool, set[str]]] = {}
    for one in ours:
        facts = (one.init, one.python, set[str]())
        _, _, architectures = found.setdefault(one.variant_of or one.name, facts)
        architectures.add(ARCHITECTURES[one.architecture].debian)
    shown = {
        name: (init.lower(), python != "none", set(re.split(", ", architectures)))
        for name, _, init, python, architectures in table("What there is")
    }
    assert shown == found


def test_the_table_has_each_architecture():
    shown = {
        (name.strip("_"), ours, package) for name, ours, package in table("Names and architectures")
    }
    assert shown == {(one.debian, one.name, one.package) for one in ARCHITECTURES.values()}
