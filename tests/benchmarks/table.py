"""Writes measured figures into the table of docs/performance.md.

    vmsandbox bench --json > figures.json
    python tests/benchmarks/table.py figures.json docs/performance.md

The last three cells of each row that begins with a figure's name are replaced, and the line that ends with
``<!-- machine -->``. A figure that was not measured keeps its row.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_MARK = "<!-- machine -->"


def main() -> None:
    """Rewrite the file."""
    figures, document = (Path(name) for name in sys.argv[1:])
    content = json.loads(figures.read_text())
    lines = document.read_text().splitlines()
    document.write_text("".join(f"{filled(line, content)}\n" for line in lines))


def filled(line: str, content: dict[str, Any]) -> str:
    """A line of the document with what was measured."""
    if line.endswith(_MARK):  # at its beginning, it would keep the line from being Markdown
        return f"{about(content)} {_MARK}"
    cells = line.split(" | ")
    key = cells[0].removeprefix("| ").strip("`")
    if not line.startswith("| `") or key not in content:
        return line
    head = line.strip("|").split("|")[:-3]
    value = text(content[key]) if content[key] is not None else content["reasons"][key]
    measured = [value, text(content["ratios"].get(key)), str(content["samples"][key])]
    return f"|{'|'.join(head)}| {' | '.join(measured)} |"


def about(content: dict[str, Any]) -> str:
    """Where it was measured, in a sentence."""
    machine = content["machine"]
    return (
        f"`{content['image']}`, {content['memory_bytes'] >> 20} MiB; QEMU {content['qemu']}, "
        f"{content['accelerator']}; {machine['processors']} × {machine['processor']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, load {machine['load']:g}."
    )


def text(value: object) -> str:
    """A figure, or its parts."""
    if isinstance(value, dict):
        return " and ".join(text(part) for part in value.values())
    return f"{value:,.6g}" if isinstance(value, float | int) else ""


if __name__ == "__main__":
    main()
