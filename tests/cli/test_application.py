"""The command as a whole: help, version, exit statuses, errors; no guest is started."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from pytest_vmsandbox import cli
from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.cli import examine
from pytest_vmsandbox.core.errors import (
    CommandError,
    CommandResult,
    CommandTimeout,
    ConfigError,
    ImageError,
    LaunchError,
    TransferError,
)
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE
from support import images
from support.definitions import DERIVED, DISK, RECIPE as PIE, changed, toml, write


def runner():
    """With the two output streams apart, as click 8.1 does only when told to."""
    told: dict[str, Any] = (
        {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    )
    return CliRunner(**told)


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Run the command in this process, with a cache of its own."""
    monkeypatch.setenv("VMSANDBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VMSANDBOX_RUNTIME", str(tmp_path / "run"))
    return lambda *arguments: runner().invoke(cli.application, arguments)


def start(*arguments, path=None, **env):
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest_vmsandbox", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **env, **({"PATH": str(path)} if path else {})},
    )


def no_escapes(text):
    return "\x1b" not in text


@pytest.mark.parametrize("name", list(cli._COMMANDS))
def test_each_command_is_there_and_explains_itself(invoke, name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")


def test_help_lists_the_commands_as_they_describe_themselves(invoke):
    output = " ".join(invoke("--help").output.split())
    for name, summary in cli._COMMANDS.items():
        assert f"{name} {summary}" in output


def test_help_loads_no_command():
    code = (
        "import sys; from pytest_vmsandbox import cli\n"
        "try: cli.application(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('paramiko', 'asyncio', 'rich', 'pytest') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(invoke):
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.startswith("vmsandbox ")


RESULT = CommandResult(argv=("x",), returncode=1, stdout="", stderr="", duration=0.0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (CommandError("x", result=RESULT), 1),
        (CommandTimeout("x", seconds=1), 1),
        (TransferError("x"), 1),
        (ImageError("x"), 69),
        (LaunchError("x"), 69),
        (PermissionError(13, "x"), 69),
        (ExceptionGroup("g", [ConfigError("x"), ImageError("y")]), 69),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_status(monkeypatch, error, status):
    @click.command
    def broken():
        raise error

    monkeypatch.setattr(cli.Application, "get_command", lambda *_: broken)
    result = runner().invoke(cli.application, ["broken"])
    assert (result.exit_code, result.stdout) == (status, "")
    assert "Traceback" not in result.stderr


def test_an_error_says_its_remedy_and_its_notes(monkeypatch):
    @click.command
    def broken():
        error = LaunchError("no room", details="two\nlines", remedy="make room")
        error.add_note("see /artifacts")
        raise error

    monkeypatch.setattr(cli.Application, "get_command", lambda *_: broken)
    result = runner().invoke(cli.application, ["broken"])
    assert result.stderr.splitlines() == [
        "vmsandbox: [launch] no room", "two", "lines", "Remedy: make room", "see /artifacts",
    ]  # fmt: skip


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    @click.command
    def broken():
        raise ExceptionGroup("g", [ImageError("x"), ZeroDivisionError()])

    monkeypatch.setattr(cli.Application, "get_command", lambda *_: broken)
    assert isinstance(runner().invoke(cli.application, ["broken"]).exception, ExceptionGroup)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nothing"], 2, "No such command"),
        (["run", "tinny", "--", "true"], 2, "did you mean 'tiny'"),
        (["run", "tiny"], 2, "Missing argument"),
        (["run", "tiny", "--", "\udcff"], 2, "is not UTF-8"),
        (["run", "tiny", "uname", "-s"], 2, "put -- before that command"),
        (["run", "tiny", "--memroy", "1GiB", "--", "ls", "-l"], 2, "Did you mean"),
        (["run", "tiny", "--memory", "lots", "--", "true"], 2, "memory='lots' is not a size"),
        (["run", "tiny", "--cpus", "0", "--", "true"], 2, "cpus='0'"),
        (["run", "tiny", "--network", "wifi", "--", "true"], 2, "use 'isolated', 'nat', or a list"),
        (["run", "tiny", "--user", "a b", "--", "true"], 2, "not a user name"),
        (["run", "tiny", "--timeout", "-1", "--", "true"], 2, "--timeout"),
        (["run", "tiny", "--accel", "xen", "--", "true"], 2, "'xen'"),
        (["run", "tiny", "--push", "nowhere", "--", "true"], 2, "SRC:DEST"),
        (["run", "tiny", "--push", "/no/such:/x", "--", "true"], 2, "does not exist"),
        (["run", "tiny", "--", "true"], 69, "vmsandbox images build tiny"),
        (["shell", "tiny"], 69, "vmsandbox images build tiny"),
        (["shell", "nothing"], 2, "there is no image 'nothing'"),
        (["images", "build", "debien-*"], 2, "there is no image 'debien-*'"),
        (["images", "rm", "nothing"], 2, "there is no image 'nothing'"),
        (["quickstart", "--image", "nothing"], 2, "there is no image 'nothing'"),
    ],
    ids=lambda value: ascii(" ".join(value)) if isinstance(value, list) else None,
)
def test_wrong_usage(invoke, arguments, status, said):
    result = invoke(*arguments)
    assert result.exit_code == status
    assert said in result.stderr
    assert result.stdout == ""
    assert no_escapes(result.stderr)


def test_as_a_program(tmp_path):
    done = start("run", "nothing", "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "vmsandbox: there is no image 'nothing'\nRemedy: The images are: "
    )


def test_without_an_ssh_client(tmp_path):
    done = start("shell", "tiny", path=tmp_path)
    assert done.returncode == 69
    assert "apt-get install openssh-client" in done.stderr


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    done = start("images", "build", "tiny", VMSANDBOX_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 69
    assert "Traceback" not in done.stderr
    assert "VMSANDBOX_CACHE" in done.stderr


def test_a_reader_that_goes_away():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest_vmsandbox", "images", "list"],
            stdout=gone,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    assert b"Traceback" not in done.stderr


# -- images ----------------------------------------------------------------------------------------

RECIPE = """\
#!/bin/sh
echo "== baking"
[ ! -e fail ] || { echo "the oven is cold" >&2; exit 3; }
echo kernel > "$VMSANDBOX_OUT/vmlinuz"
echo initrd > "$VMSANDBOX_OUT/initrd.img"
cp key "$VMSANDBOX_OUT/host_key.pub"
"""
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n"
DEFINITION = images.toml(description="A cake")


@pytest.fixture
def cakes(tmp_path, monkeypatch):
    """A folder with two images that are quickly built: cake-1 and cake-2."""
    root = tmp_path / "images"
    for name in ("cake-1", "cake-2"):
        folder = root / name
        images.define(folder, DEFINITION, RECIPE)
        (folder / "key").write_text(KEY)
    monkeypatch.setenv("VMSANDBOX_IMAGE_PATH", str(root))
    return root


def define(folder, values):
    write(folder, toml(values))


def states(invoke):
    content = json.loads(invoke("images", "list", "--json").stdout)
    assert content["schema"] == 1
    return {image["name"]: image["state"] for image in content["images"]}


def test_images_come_and_go(invoke, cakes):
    assert states(invoke)["cake-1"] == "missing"
    result = invoke("images", "build", "cake-*")
    assert result.exit_code == 0
    assert "building cake-1: A cake\n  baking\ncake-1 is built: " in result.stdout
    assert no_escapes(result.output)
    assert states(invoke) | {"cake-1": "built", "cake-2": "built"} == states(invoke)
    assert invoke("images", "build", "cake-1").stdout == "cake-1 is built\n"
    assert "baking" in invoke("images", "build", "cake-1", "--force").stdout

    (cakes / "cake-1" / "more").touch()
    assert states(invoke)["cake-1"] == "stale"

    result = invoke("images", "rm", "cake-*")
    assert result.exit_code == 0
    assert "removed cake-1: freed" in result.stdout
    assert states(invoke)["cake-1"] == "missing"
    assert (
        invoke("images", "rm", "cake-1").stdout
        == "cake-1 is not built, so there is nothing to remove\n"
    )


def test_list_for_people(invoke, cakes):
    invoke("images", "build", "cake-1")
    result = invoke("images", "list")
    lines = {line.split()[0]: line.split(None, 3) for line in result.stdout.splitlines()}
    assert lines["cake-1"][1] == "built"
    assert lines["cake-2"][1:] == ["missing", "-", "A cake (host-driven)"]
    assert no_escapes(result.output)


def test_json_has_the_size(invoke, cakes):
    invoke("images", "build", "cake-1")
    images = json.loads(invoke("images", "list", "--json").stdout)["images"]
    cake = next(image for image in images if image["name"] == "cake-1")
    assert cake["size_bytes"] > 0
    assert (cake["description"], cake["architecture"]) == ("A cake", "x86_64")


def test_json_has_what_the_definition_says(invoke, cakes):
    define(cakes / "pie", changed(PIE, {"system.python": "3.9"}))
    define(cakes / "pie-2", changed(DERIVED, {"from": "pie", "system.python": "3.8"}))
    define(cakes / "pie-3", DISK)
    content = json.loads(invoke("images", "list", "--json").stdout)
    images = {image["name"]: image for image in content["images"]}
    keys = ("system", "version", "origin", "base", "firmware", "in_vm", "problem")
    assert [images["pie"][key] for key in keys] == [
        "debian",
        "13",
        "recipe",
        "",
        "kernel",
        True,
        "",
    ]
    assert [images["pie-2"][key] for key in keys] == (
        ["debian", "13", "from", "pie", "kernel", False, ""]
    )
    assert [images["pie-3"][key] for key in keys] == ["", "", "source", "", "uefi", True, ""]


def test_what_a_recipe_has_noted_stays_with_the_image(invoke, cakes):
    note = "echo 'no updates from pie-security' >$VMSANDBOX_OUT/notes.txt"
    recipe = cakes / "cake-1" / "build"
    recipe.write_text(f"{recipe.read_text()}{note}\n")
    assert "cake-1: no updates from pie-security" in invoke("images", "build", "cake-1").stdout
    (line,) = [x for x in invoke("images", "list").stdout.splitlines() if x.startswith("cake-1")]
    assert line.endswith("; no updates from pie-security")
    images = json.loads(invoke("images", "list", "--json", "cake-1").stdout)["images"]
    assert [image["notes"] for image in images] == [["no updates from pie-security"]]


def test_the_list_is_quick(cakes, tmp_path):
    """It takes 0.13 s. That is so because it imports nothing that takes long."""
    script = """
import atexit, sys

atexit.register(lambda: print("modules:", *sys.modules))
from pytest_vmsandbox.cli import main
sys.argv = ["vmsandbox", "images", "list"]
main()
"""
    environment = {**os.environ, "VMSANDBOX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    listed, _, modules = done.stdout.partition("modules: ")
    assert "cake-1 " in listed
    slow = ("rich", "paramiko", "asyncio", "pytest", "urllib.request", "email", "http", "ssl")
    ours = [f"pytest_vmsandbox.{name}" for name in ("guests.guest", "machine", "inside", "plugin")]
    assert {*modules.split()} & {*slow, *ours} == set()


def test_the_list_has_colours_where_they_are_wanted(cakes, tmp_path):
    cache = str(tmp_path / "cache")
    plain = start("images", "list", VMSANDBOX_CACHE=cache).stdout
    coloured = start("images", "list", VMSANDBOX_CACHE=cache, FORCE_COLOR="1", COLUMNS="20").stdout
    assert "\x1b[1mcake-1" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain
    assert no_escapes(plain)


def test_imported_images_are_listed(invoke, tmp_path):
    define(tmp_path / "cache" / "imported" / "pie", DISK)
    assert states(invoke)["pie"] == "missing"


def test_an_image_without_a_definition_is_seen_and_removed(invoke, cakes, monkeypatch):
    invoke("images", "build", "cake-1")
    monkeypatch.delenv("VMSANDBOX_IMAGE_PATH")
    assert states(invoke)["cake-1"] == "other"
    assert invoke("images", "rm", "cake-1").exit_code == 0
    assert "cake-1" not in states(invoke)


def test_one_build_that_fails_does_not_keep_the_others(invoke, cakes):
    (cakes / "cake-1" / "fail").touch()
    result = invoke("images", "build", "cake-1", "cake-2")
    assert result.exit_code == 69
    assert "building 'cake-1' failed" in result.stderr
    assert "the oven is cold" in result.stderr
    assert states(invoke)["cake-2"] == "built"


def test_one_definition_that_is_wrong_does_not_keep_the_others(invoke, cakes):
    (cakes / "cake-1" / "image.toml").write_text("schema = 9")
    result = invoke("images", "build", "cake-*")
    assert result.exit_code == 2
    assert "cake-1/image.toml: schema = 9 is not allowed" in result.stderr
    assert states(invoke)["cake-2"] == "built"


def test_a_definition_that_is_wrong_names_file_and_key(invoke, cakes):
    file = cakes / "cake-1" / "image.toml"
    file.write_text(DEFINITION.replace('recipe = "build"', 'recipe = "bake"'))
    result = invoke("images", "list")
    assert result.exit_code == 2
    assert f"{file}: recipe = 'bake' is not allowed" in result.stderr
    lines = [line.split(None, 3) for line in result.stdout.splitlines()]
    assert ["cake-1", "invalid", "-", "its definition is wrong"] in lines
    assert ["cake-2", "missing", "-", "A cake (host-driven)"] in lines

    result = invoke("images", "list", "--json")
    assert result.exit_code == 2
    listed = {image["name"]: image for image in json.loads(result.stdout)["images"]}
    assert str(file) in listed["cake-1"]["problem"]
    assert "Remedy: " in listed["cake-1"]["problem"]


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_without_qemu(tmp_path):
    done = start("doctor", "--json", path=tmp_path, VMSANDBOX_CACHE=str(tmp_path / "cache"))
    content = json.loads(done.stdout)
    assert (done.returncode, content["schema"], content["ok"]) == (1, 1, False)
    checks = {check["name"]: check for check in content["checks"]}
    assert checks["QEMU"]["status"] == "failed"
    assert "qemu-system-x86" in checks["QEMU"]["remedy"]
    assert set(checks["QEMU"]) == {"name", "status", "found", "remedy"}
    assert not (tmp_path / "cache").exists()  # looking changes nothing


def test_doctor_works_although_a_definition_is_wrong(cakes, tmp_path):
    (cakes / "cake-1" / "image.toml").write_text("schema = 9")
    os.mkfifo(cakes / "cake-2" / "odd")
    cache = str(tmp_path / "cache")
    done = start("doctor", "--json", path=tmp_path, VMSANDBOX_CACHE=cache)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    check = found["image definitions"]
    assert (check["status"], check["found"]) == (
        *("warning", "the definition of cake-1, cake-2 is wrong"),
    )
    assert "vmsandbox images list" in check["remedy"]


def test_doctor_knows_images_for_other_architectures(tmp_path):
    folder, cache = tmp_path / "images", tmp_path / "cache"
    for name, architecture in {"deb-1": "s390x", "deb-2": "riscv64"}.items():
        images.define(folder / name, images.toml(architecture=architecture))
        images.keep(cache, Catalogue([folder]).get(name))
    (tmp_path / "apt-get").symlink_to("/bin/true")
    options = ("doctor", "--json", "--image-path", str(folder))
    done = start(*options, path=tmp_path, VMSANDBOX_CACHE=str(cache))
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    check = found["other architectures"]
    assert (check["status"], check["found"]) == (
        *("warning", "none can be emulated; deb-1, deb-2 built; no emulator for deb-1, deb-2"),
    )
    command, _, packages = check["remedy"].partition(" install ")
    assert command.endswith("apt-get")
    assert {"opensbi", "qemu-system-data", "qemu-system-misc"} <= {*packages.split()}
    assert ";" not in packages


def test_doctor_for_people(invoke):
    result = invoke("doctor")
    assert result.exit_code in (0, 1)
    assert "QEMU" in result.stdout
    assert no_escapes(result.output)


# -- quickstart ------------------------------------------------------------------------------------


def test_quickstart_asks_nobody(tmp_path):
    for name in ("apt-get", "env"):
        (tmp_path / name).symlink_to("/bin/true")
    done = start("quickstart", path=tmp_path, VMSANDBOX_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "apt-get install --yes --no-install-recommends" in done.stdout
    assert "qemu-system-x86" in done.stdout
    assert "--yes" in done.stdout
    assert no_escapes(done.stdout + done.stderr)


def test_quickstart_of_another_architecture(tmp_path):
    """What its image needs is found before anything is built."""
    for name in ("apt-get", "env"):
        (tmp_path / name).symlink_to("/bin/true")
    cache = str(tmp_path / "cache")
    foreign = "tiny_amd64" if platform.machine() == "aarch64" else "tiny_arm64"
    done = start("quickstart", "--image", foreign, path=tmp_path, VMSANDBOX_CACHE=cache)
    assert done.returncode == 1
    assert "QEMU for a" in done.stdout
    assert "qemu-system-arm" in done.stdout.split("These commands will add them:")[1]
    assert "building" not in done.stdout + done.stderr


@pytest.mark.parametrize("emulated", [True, False])
def test_doctor_of_a_machine_that_nothing_is_for(invoke, monkeypatch, emulated):
    def find(architecture):
        if emulated and architecture != "s390x":
            return SimpleNamespace(path=Path("/q"), version=(9, 9))
        raise LaunchError("there is no emulator")

    monkeypatch.setattr(platform, "machine", lambda: "loongarch64")
    monkeypatch.setattr(examine, "find_qemu", find)
    content = json.loads(invoke("doctor", "--json").stdout)
    found = {check["name"]: check for check in content["checks"]}
    qemu = found["QEMU"]
    assert qemu["found"].startswith("no image is for loongarch64, which this machine is")
    if emulated:
        assert qemu["status"] == "warning"
        assert ". Emulated: amd64, i386, arm64" in qemu["found"]
        assert "s390x" not in qemu["found"]
        assert "images list --all" in qemu["remedy"]
    else:
        assert qemu["status"] == "failed"
        assert "qemu-system-x86" in qemu["remedy"]
    assert found["images"]["remedy"] == f"vmsandbox images build {DEFAULT_IMAGE}_amd64"
    assert "accelerator" not in found


def test_quickstart_where_there_is_no_apt(tmp_path, monkeypatch):
    from pytest_vmsandbox.catalogue import programs
    from pytest_vmsandbox.cli import quickstart
    from pytest_vmsandbox.cli.screen import Screen

    monkeypatch.setattr(programs, "SBIN", ())
    (tmp_path / "dnf").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(quickstart.Stop):
        quickstart._install(Screen(), ("qemu-system-x86",), [], yes=True)


@pytest.mark.parametrize(("known", "updates"), [(True, 0), (False, 1)])
def test_quickstart_installs(tmp_path, monkeypatch, known, updates):
    """With an apt-get that only writes down what it was told."""
    from pytest_vmsandbox.cli import quickstart
    from pytest_vmsandbox.cli.screen import Screen

    log = tmp_path / "log"
    script = tmp_path / "apt-get"
    script.write_text(
        f'#!/bin/sh\necho "$DEBIAN_FRONTEND $*" >> {log}\n'
        f'case "$*" in *--simulate*) exit {0 if known else 100};; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    marker = tmp_path / "done"
    quickstart._install(Screen(), ("cpio", "zstd"), [["touch", str(marker)]], yes=True)
    lines = [line for line in log.read_text().splitlines() if "--simulate" not in line]
    assert sum(line.endswith(" update") for line in lines) == updates
    assert lines[-1].startswith("noninteractive -qq")
    assert lines[-1].endswith(" install --yes --no-install-recommends cpio zstd")
    assert marker.exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_names_of_strangers_play_no_tricks_on_the_terminal(terminal, monkeypatch, capsys):
    from pytest_vmsandbox.cli.screen import Screen

    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    screen = Screen()
    screen.parts(("left out: \x1b]0;title\x07\x1b[2Ja\x9b", ""), ("\x1b[1Ab", ""))
    with screen.stages() as stage:
        stage("fetching \x1b[2Jc\nRemedy: d")
    out = capsys.readouterr().out
    assert out.startswith("left out: ab\n")
    assert "fetching c Remedy: d" in out
    assert not any(theirs in out for theirs in ("\x1b]0;", "\x1b[2J", "\x9b", "\x07", "title"))


@pytest.mark.parametrize(("terminal", "lines"), [(True, 2), (False, 3)])
def test_how_far_a_stage_is(terminal, lines, monkeypatch, capsys):
    """A terminal shows it in the line of the stage."""
    from pytest_vmsandbox.cli.screen import Screen

    monkeypatch.setattr(Screen, "lively", terminal)
    with Screen().stages() as stage:
        for text in ("installing", "installing: 3 packages", "making the disk"):
            stage(text)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == lines
    assert "installing: 3 packages" in shown[lines - 2]
    assert "making the disk" in shown[lines - 1]


def test_the_suite_is_shipped():
    suite = Path(cli.__file__).with_name("quickstart_suite")
    assert {"pytest.ini", "test_first_steps.py"} <= {file.name for file in suite.iterdir()}


def test_a_program_in_front_is_given_time_to_end_after_an_interrupt():
    """As pytest needs it for its summary, and dpkg for its database."""
    code = (
        "import signal, sys; from pytest_vmsandbox.core import foreground\n"
        "script = 'trap \"sleep 1; echo orderly; exit 3\" INT; echo up; while :; do sleep 0.1; done'\n"
        "try: foreground.run(['sh', '-c', script])\n"
        "except KeyboardInterrupt: print('then us')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.read() == "orderly\nthen us\n"
