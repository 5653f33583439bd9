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
SUITE = (
    "cp -r tests/support/suites/ci ~/suite && "
    "cd ~/suite && git init --quiet && git add ."
)


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
    return f"echo '--- {step}: {how}'; {script}"


# -- GitHub ---------------------------------------------------------------------------------------

OUTPUT = "~/output"
CACHE = "~/the-cache"  # stands for GitHub's: a file for each key
KEY = f"$(sed -n 's/^key=//p' {OUTPUT})"
IN_SUITE = f"cd ~/suite && export PATH=~/python/bin:$PATH GITHUB_OUTPUT={OUTPUT} && "
# What stands for an action, and why that will do.
ACTIONS = {
    "actions/checkout": ("replaced by a copy of tests/support/suites/ci", f"rm -rf ~/suite; {SUITE}"),
    "actions/setup-python": (
        "replaced by a virtual environment of the system's Python, with the package from this checkout",
        "[ -d ~/python ] || { python3 -m venv ~/python && ~/python/bin/pip install --quiet ~/project; }",
    ),
    "actions/cache/restore": (
        "replaced by a copy of a file, if there is one of that key",
        f"if [ -e {CACHE}/{KEY} ]; then cp {CACHE}/{KEY} ~/images.tar && echo 'found'; else echo 'not found'; fi",
    ),
    "actions/cache/save": (
        "replaced by a copy to a file of that key, if there is none",
        f'mkdir -p {CACHE} && [ -e {CACHE}/"{KEY}" ] || {{ cp ~/images.tar {CACHE}/"{KEY}" && ls -lh {CACHE}; }}',
    ),
    "actions/upload-artifact": ("nothing failed, so there is nothing to keep but", "ls ~/suite/junit.xml"),
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
    yield "echo '=== a test fails'; " + f"echo {shlex.quote(FAILING)} >>~/suite/tests/test_greeting.py"
    run = next(step["run"] for step in steps if "pytest " in step.get("run", ""))
    yield from kept(f"{IN_SUITE}bash -e -c {shlex.quote(run)}", "~/suite")


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
    yield f"echo '--- (before) the runner copies the project'; apt-get update -qq && apt-get install -qq git >/dev/null; {SUITE}"
    # `pip install` is to find the package where it would find it in the index.
    wheel = "python3 -m venv /tmp/build && /tmp/build/bin/pip wheel --quiet --no-deps --wheel-dir /wheels ~/project"
    yield told(
        "(before)", "the package comes from this checkout, not from the index",
        f"apt-get install -qq --no-install-recommends python3-venv >/dev/null && {wheel}",
    )  # fmt: skip
    first = "\n".join(["export PIP_FIND_LINKS=/wheels", *map(shown, job["before_script"])])
    last = "\n".join(map(shown, job["after_script"]))
    tests = "\n".join(map(shown, job["script"]))
    bash = "cd ~/suite && bash -eo pipefail -c "
    for number in (1, 2):
        yield f"echo '=== run {number} of the job'; rm -rf ~/.cache/vmsandbox; cd ~/suite && ls -lh images.tar 2>/dev/null || echo 'there is no cache'"
        yield f"{bash}{shlex.quote(f'{first}\n{tests}')}"
        yield f"{bash}{shlex.quote(last)}"
    yield f"echo '=== a test fails'; echo {shlex.quote(FAILING)} >>~/suite/tests/test_greeting.py"
    yield from kept(f"{bash}{shlex.quote(f'. .venv/bin/activate\n{tests}')}", "~/suite")


def shown(line: str) -> str:
    """A line that is shown before it is run."""
    return f"echo {shlex.quote(f'$ {line}')}\n{line}"


def kept(command: str, folder: str) -> Iterator[str]:
    """The tests once more: they have to fail, and to leave what the recipe keeps."""
    yield f"if {command}; then echo 'the job should have failed'; exit 1; fi"
    yield f"cd {folder} && grep -q '<failure' junit.xml && find vm-artifacts -name console.log | grep . && echo 'kept: junit.xml, vm-artifacts'"


if __name__ == "__main__":
    main()
