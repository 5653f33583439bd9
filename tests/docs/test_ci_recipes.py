"""The CI recipes: against the published schemas, and as far as a shell and our own command can judge them.

`tests/cleanroom/ci.py` runs their steps in a clean root.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.cli import application

HOW_TO = Path(__file__).resolve().parents[2] / "docs" / "how-to"
SCHEMAS = {"github": "vendor.github-workflows", "gitlab": "vendor.gitlab-ci"}
both = pytest.mark.parametrize("name", SCHEMAS)


def recipe(name):
    return HOW_TO / "ci" / f"{name}.yml"


def scripts(name):
    """The pieces of shell in a recipe; those of GitLab's that run in one shell are one."""
    content = YAML(typ="safe").load(recipe(name))
    if name == "github":
        return [step["run"] for step in content["jobs"]["tests"]["steps"] if "run" in step]
    job = content["tests"]
    return ["\n".join(job["before_script"] + job["script"]), "\n".join(job["after_script"])]


def commands(name, program):
    """The command lines of a program in a recipe."""
    parts = re.split(r"\$\(|\)|&&|;|\||\n", "\n".join(scripts(name)))
    return [shlex.split(part) for part in parts if part.strip().startswith(f"{program} ")]


def check(file, schema):
    """What check-jsonschema says about a file, by a schema that it carries: it asks no network."""
    program = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    assert program, "check-jsonschema is not installed beside this Python"
    return subprocess.run(
        [program, "--builtin-schema", schema, file], capture_output=True, text=True, check=False
    )


@both
def test_schema(name):
    done = check(recipe(name), SCHEMAS[name])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("github", "runs-on:", "run-on:"), ("gitlab", "when: always", "when: sometimes")],
)
def test_the_schema_sees_mistakes(tmp_path, name, right, wrong):
    text = recipe(name).read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "wrong.yml").write_text(text.replace(right, wrong), encoding="utf-8")
    done = check(tmp_path / "wrong.yml", SCHEMAS[name])
    assert done.returncode == 1, done.stdout + done.stderr


@both
def test_the_page_shows_the_recipe(name):
    page = (HOW_TO / "ci.md").read_text(encoding="utf-8")
    assert f"```{{literalinclude}} ci/{name}.yml\n" in page


@both
def test_syntax(name):
    assert scripts(name)
    for script in scripts(name):
        done = subprocess.run(
            ["bash", "-n"], input=script, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@both
def test_our_commands_exist(name):
    found = commands(name, "vmsandbox")
    assert len(found) >= 2
    for _, *words in found:
        done = CliRunner().invoke(application, [*words, "--help"])
        assert done.exit_code == 0, done.output


@both
def test_images_and_options_exist(name, pytestconfig):
    ((_, *arguments),) = commands(name, "pytest")
    options, rest = pytestconfig._parser.parse_known_and_unknown_args(arguments)
    assert not rest
    (built,) = (words[3:] for words in commands(name, "vmsandbox") if words[1] == "images")
    assert Catalogue().select(built) == Catalogue().select(options.vm) == options.vm
