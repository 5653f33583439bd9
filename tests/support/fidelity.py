"""The oracle: what a run inside a guest must have in common with plain pytest there."""

from __future__ import annotations

import difflib
import re
import shlex
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_vmsandbox.plugin.in_vm.remote_reports import harmless

OUTCOMES = Path(__file__).with_name("outcomes")
# What a run has to be told so that more of it can be compared.
ARGS = ("-o", "junit_logging=all")
_HEADER = re.compile(
    r"^(platform |cachedir: |rootdir: |configfile: |plugins: |metadata: |testpaths: |vmsandbox: |using "
    r"|--- generated xml file|\d+ workers|bringing up nodes|created: |initialized: |ready: |scheduling tests|\[gw\d+\] )"
)


@dataclass(frozen=True)
class Line:
    """A command line of pytest's, on whose two runs the comparison is made.

    Attributes:
        args: its arguments; ``[IMAGE-`` starts the parameters of a test.
        ordered: whether the order of what is said is no chance.
        environment: variables for both.
    """

    args: tuple[str, ...]
    ordered: bool = True
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, *, ordered: bool = True, **environment: str) -> Line:
        """From a text as a person types it."""
        return cls(tuple(shlex.split(text)), ordered, environment)

    def arguments(self, image: str | None = None) -> list[str]:
        """For a run on an image, or for plain pytest."""
        start = f"[{image}-" if image else "["
        return [*ARGS, *(arg.replace("[IMAGE-", start) for arg in self.args)]


@dataclass(frozen=True)
class Run:
    """What a run of pytest has said, but for times, places and the image.

    Attributes:
        status: its exit status.
        cases: of junit's file, in order; each is a list of lines.
        screen: of the terminal, without header.
    """

    status: int
    cases: list[str]
    screen: list[str]


@dataclass(frozen=True)
class Said:
    """What a run of pytest has said, as it came."""

    status: int
    screen: str
    junit: bytes


@dataclass(frozen=True)
class Reader:
    """Makes what has been said comparable.

    Args:
        image: whose name is in the ids of tests.
        places: folders, which are called otherwise on the other side: folder → name.
    """

    image: str
    places: dict[str, str]

    def read(self, said: Said, *, ordered: bool = True) -> Run:
        """What is to be compared; in any order if the order is chance."""
        cases = self._cases(said.junit)
        screen = list(self._screen(said.screen))
        if not ordered:
            cases.sort()
            screen = sorted(_summary(screen))
        return Run(status=said.status, cases=cases, screen=screen)

    def text(self, text: str) -> str:
        """A text without what differs between any two runs."""
        for place, name in self.places.items():
            text = text.replace(place, name)
        text = re.sub(r"#x([0-9A-F]{2,4})", lambda it: chr(int(it[1], 16)), text)
        text = re.sub(r"[\ud800-\udfff]", lambda it: f"\\u{ord(it[0]):x}", text)
        text = re.sub(r"\x1b\[[0-9;]*m|\\udcff|\\xff", "", harmless(text))
        text = text.replace(f"[{self.image}]", "").replace(f"[{self.image}-", "[")
        text = re.sub(r"(/tmp)?/pytest-of-\w+/pytest-\d+\b", "<tmp>", text)
        text = re.sub(r"(long ){20,}.*", "long …", text)
        text = re.sub(r"(\.\./)+(opt/vmsandbox/)?env/", "<env>/", text)  # outside of the project
        # Fixtures of plugins that stay on the host; junit cuts a message where their line is too long.
        text = re.sub(r", (testrun_uid|worker_id|cov|no_cover)\b", "", text)
        if "more lines; full report in element text]" in text:
            text = re.sub(r"^> +available fixtures: .*\n", "", text, flags=re.MULTILINE)
            text = re.sub(r"\[\+\d+ more lines;", "[+… more lines;", text)
        text = re.sub(r"^-+ vmsandbox -+\nartifacts: .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"0x[0-9a-f]{6,}", "0x…", text)
        text = re.sub(r"\b\d+\.\d\ds( \(\d:\d\d:\d\d\))?", "N.NNs", text)
        text = re.sub(
            r"oldfd=\d+|frames out of \d+|repeated \d+ more|cache from \S+ ago|(?<=^n = )9\d\d$",
            "…",
            text,
            flags=re.MULTILINE,
        )
        return re.sub(r"([=_-])\1{3,}", r"\1\1\1", text)

    def _cases(self, junit: bytes) -> list[str]:
        if not junit:
            return []
        cases = []
        for suite in ET.fromstring(junit).iter("testsuite"):
            counts = [f"{it}={suite.get(it)}" for it in ("errors", "failures", "skipped", "tests")]
            cases.append(f"testsuite {' '.join(counts)}")
            cases += [self.element(it) for it in suite]
        return cases

    def element(self, element: ET.Element) -> str:
        """What junit's file has of a test."""
        lines = []
        for it in element.iter():
            is_ours = it.tag == "property" and it.get("name") in ("vm", "vm_artifacts")
            if it.tag == "properties" or is_ours:
                continue
            attributes = {k: v for k, v in it.attrib.items() if k not in ("time", "timestamp")}
            head = " ".join(f"{name}={value}" for name, value in attributes.items())
            lines.append(self.text(f"{it.tag} {head}\n{it.text or ''}".rstrip()))
        return "\n".join(lines)

    def _screen(self, screen: str) -> Iterable[str]:
        for line in self.text(screen).splitlines():
            if not _HEADER.match(line):
                shown = re.sub(r" +(?=\[ *\d+%\]$)", " ", line)
                yield "N.NNs …" if shown.startswith("N.NNs ") else shown.rstrip()


def _summary(screen: list[str]) -> list[str]:
    starts = [n for n, line in enumerate(screen) if "short test summary info" in line]
    return screen[starts[0] :] if starts else screen[-1:]


def differences(inside: Run, plain: Run, *, most: int = 60) -> list[str]:
    """What differs, in words; empty if nothing does."""
    found = []
    if inside.status != plain.status:
        found.append(f"exit status: {inside.status}, but plain pytest's is {plain.status}")
    for what in ("cases", "screen"):
        ours, theirs = getattr(inside, what), getattr(plain, what)
        if ours != theirs:
            found += _diff(what, theirs, ours)[:most]
    return found


def _diff(what: str, theirs: Sequence[str], ours: Sequence[str]) -> list[str]:
    old = [line[:300] for it in theirs for line in it.splitlines()]
    new = [line[:300] for it in ours for line in it.splitlines()]
    return list(difflib.unified_diff(old, new, f"plain {what}", f"inside {what}", n=2, lineterm=""))
