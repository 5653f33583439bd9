"""What a run has written about its tests."""

from xml.etree import ElementTree as ET


def properties(file):
    """The properties in junit's file of each case, by the name of the test."""
    cases = ET.parse(file).iter("testcase")
    return {
        case.get("name"): {it.get("name"): it.get("value") for it in case.iter("property")}
        for case in cases
    }
