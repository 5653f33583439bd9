"""The shell steps of the CI recipes in docs/how-to/ci, in a clean root.

Each recipe runs as it stands, on a small project, in a system like that of its service: GitHub's on
Ubuntu 24.04 as an ordinary user with sudo, GitLab's on Debian 13 as root. It runs twice, the second time with the
images from the cache that the first one has left, and nothing else. Then a test fails, and what the recipe keeps of it has to be there.

What only the service has is replaced, and each such step is told. The package comes from this checkout, not from the index.

    python tests/cleanroom/ci.py github
    python tests/cleanroom/ci.py gitlab

Needs what `run.py` needs, ruamel.yaml (check-jsonschema brings it), and the package ubuntu-keyring for GitHub's.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "docs" / "how-to" / "ci"
ROOTS = {"github": ("noble", "user"), "gitlab": ("trixie", "root")}
FAILING = "def test_that_fails(vm): vm.run(['false'])"
SUITE = "cp -r tests/support/suites/ci ~/suite && cd ~/suite && git init --quiet && git add ."


def main() -> None:
    """Turn a recipe into commands, and hand them to `run.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", choices=ROOTS)
    parser.add_argument("--dirty", action="store_true", help="as of run.py")
    parser.add_argument("--show", action="store_true", help="show the commands, and run none")
    options = parser.parse_args()
    found = recipe(options.recipe)
    commands = [*(github if options.recipe == "github" else gitlab)(found)]
    if options.show:
        print("\n".join(commands))
        return
    suite, who = ROOTS[options.recipe]
    argv = [sys.executable, str(HERE / "run.py"), "--suite", suite, "--as", who]
    argv += [*(["--dirty"] if options.dirty else []), "--commands", *commands]
    os.execv(sys.executable, argv)


def recipe(name: str) -> dict[str, Any]:
    """A recipe, read."""
    found: dict[str, Any] = YAML(typ="safe").load(RECIPES / f"{name}.yml")
    return found


def told(step: str, how: str, script: str) -> str:
    """A command that says which step it is before it does it."""
    return f"echo {shlex.quote(f'--- {step}: {how}')}; {script}"


# -- GitHub ---------------------------------------------------------------------------------------

OUTPUT = "~/output"
CACHE = "~/the-cache"  # stands for GitHub's: a file for each key
KEPT = f"{CACHE}/$(sed -n 's/^key=//p' {OUTPUT})"
IN_SUITE = f"cd ~/suite && export PATH=~/python/bin:$PATH GITHUB_OUTPUT={OUTPUT} && "
# What stands for an action.
ACTIONS = {
    "actions/checkout": ("replaced by a copy of a small project", f"rm -rf ~/suite; {SUITE}"),
    "actions/setup-python": (
        "replaced by a virtual environment, with the package from this checkout",
        "[ -d ~/python ] || { python3 -m venv ~/python; ~/python/bin/pip install -q ~/project; }",
    ),
    "actions/cache/restore": (
        "replaced by a copy of the file of that key",
        f"cp {KEPT} ~/images.tar 2>/dev/null && echo found || echo 'there is none'",
    ),
    "actions/cache/save": (
        "replaced by a copy to a file of that key, if there is none",
        f"mkdir -p {CACHE} && {{ [ -e {KEPT} ] || cp ~/images.tar {KEPT}; }} && ls -lh {CACHE}",
    ),
    "actions/upload-artifact": ("replaced by a look", "ls -l ~/suite/junit.xml"),
}
HOSTS_OWN = "udevadm"  # a step with it needs the host's udev and AppArmor, which no clean root has


def github(found: dict[str, Any]) -> Iterator[str]:
    """The commands for GitHub's recipe."""
    steps = found["jobs"]["tests"]["steps"]
    yield told(
        "(before)", "what GitHub's runners have", "sudo apt-get update -qq && "
        "sudo apt-get install -qq --no-install-recommends git python3-venv >/dev/null"
    )  # fmt: skip
    for number in (1, 2):
        yield f"echo '=== run {number} of the job'; rm -rf ~/images.tar ~/.cache/vmsandbox {OUTPUT}"
        yield from map(github_step, steps)
    yield f"echo '=== a test fails'; echo {shlex.quote(FAILING)} >>~/suite/tests/test_greeting.py"
    run = next(step["run"] for step in steps if "pytest " in step.get("run", ""))
    yield from kept(f"{IN_SUITE}bash -e -c {shlex.quote(run)}")


def github_step(step: dict[str, Any]) -> str:
    """The command for one step."""
    if "uses" in step:
        action = step["uses"].partition("@")[0]
        how, script = ACTIONS[action]
        return told(step.get("name", action), how, script)
    assert "${{" not in step["run"], "an expression in a script cannot be run here"
    if HOSTS_OWN in step["run"]:
        return told(step["name"], "left out: it needs the host's udev and AppArmor", "true")
    script = f"{IN_SUITE}bash -e -c {shlex.quote(step['run'])}"
    return told(step["name"], "as it stands", script)


# -- GitLab ---------------------------------------------------------------------------------------


def gitlab(found: dict[str, Any]) -> Iterator[str]:
    """The commands for GitLab's recipe.

    The runner starts one shell for the lines of `before_script` and `script`, and another one for those of
    `after_script`.
    """
    job = found["tests"]
    before, tests, after = (
        "\n".join(map(shown, job[key])) for key in ("before_script", "script", "after_script")
    )
    copied = f"apt-get update -qq && apt-get install -qq git >/dev/null && {SUITE}"
    yield told("(before)", "the runner copies the project", copied)
    # pip is to find the package where it would find it in the index.
    wheel = (
        "apt-get install -qq --no-install-recommends python3-venv >/dev/null && "
        "python3 -m venv /tmp/build && "
        "/tmp/build/bin/pip wheel --quiet --no-deps --wheel-dir /wheels ~/project"
    )
    yield told("(before)", "the package comes from this checkout, not from the index", wheel)
    fresh = "rm -rf ~/.cache/vmsandbox; cd ~/suite && git clean -ffdxq -e images.tar; ls -lh"
    for number in (1, 2):
        yield f"echo '=== run {number} of the job'; {fresh}"
        yield in_one_shell("export PIP_FIND_LINKS=/wheels", before, tests)
        yield in_one_shell(after)
    fails = f"echo {shlex.quote(FAILING)} >>~/suite/tests/test_greeting.py"
    yield f"echo '=== a test fails'; rm ~/suite/images.tar; {fails}"  # as `before_script` does
    yield from kept(in_one_shell(". .venv/bin/activate", tests))


def in_one_shell(*lines: str) -> str:
    """A command that runs lines as GitLab's runner does."""
    script = "\n".join(lines)
    return f"cd ~/suite && bash -eo pipefail -c {shlex.quote(script)}"


def shown(line: str) -> str:
    """A line that is shown before it is run."""
    return f"echo {shlex.quote(f'$ {line}')}\n{line}"


def kept(command: str) -> Iterator[str]:
    """The tests once more: they have to fail, and to leave what the recipe keeps."""
    yield f"if {command}; then echo 'the job should have failed'; exit 1; fi"
    look = "grep -q '<failure' junit.xml && find vm-artifacts -name console.log | grep ."
    yield f"cd ~/suite && {look} && echo 'kept: junit.xml, vm-artifacts'"


if __name__ == "__main__":
    main()
