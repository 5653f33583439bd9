"""What tests tell the writer of junit's file."""

from __future__ import annotations

from ..apart import keep_apart
from ..values import clean
from ..wire import Wire

keep_apart(globals())


class JUnit:
    """Stands in for that writer, which is the host's."""

    def __init__(self, family: str, wire: Wire) -> None:
        self.family = family
        self.wire = wire

    def add_global_property(self, name: str, value: object) -> None:
        if not isinstance(name, str):
            raise TypeError(
                "name parameter needs to be a string, but %s given" % type(name).__name__
            )
        self.wire.note(clean({"junit": "property", "name": name, "value": str(value)}))

    def node_reporter(self, report: object) -> JUnit:  # noqa: ARG002  # of the one that runs
        return self

    def add_attribute(self, name: str, value: object) -> None:
        self.wire.note(clean({"junit": "attribute", "name": str(name), "value": str(value)}))
