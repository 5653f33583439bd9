"""The lines that a command becomes, run by real shells: what a program sees is what was meant."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pytest_vmsandbox.guests.reaching.commands import (
    STARTED,
    Command,
    command_line,
    for_any_shell,
    kill_line,
    shipped,
)

SHELLS = [["/bin/sh", "-c"]]
SHELLS += [[path, "-c"] for name in ("dash", "bash") if (path := shutil.which(name))]
SHELLS += [[path, "sh", "-c"] for path in [shutil.which("busybox")] if path]
NAMES = [shell[0].rpartition("/")[2] for shell in SHELLS]
SEES = (
    "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), "
    "{k: v for k, v in os.environ.items() if k.startswith('T_')}, os.getpgrp() == os.getpid()]))"
)
ODD = [
    "",
    " ",
    "a b",
    "$HOME",
    "`id`",
    "$(id)",
    "'",
    '"',
    "\\",
    "\n",
    "a\nb\n",
    "*",
    "-n",
    "--",
    "!",
    "#",
    ";",
    "|",
    "&",
    "~",
    "é€",
    "\t",
    "'\\''",
    "\x01\x7f",
]
WORDS = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
) | st.sampled_from(ODD)


def run(shell, command, token="t0", ship=False):
    """What the login shell's standard output is, as lines before and after the start."""
    line, ahead = shipped(command, token) if ship else (command_line(command, token), b"")
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": "/"}
    done = subprocess.run(
        [*shell, line],
        input=ahead,
        stdout=subprocess.PIPE,
        env=env,
        check=True,
        start_new_session=True,
    )
    mark, _, rest = done.stdout.decode().partition("\n")
    word, its_token, group = mark.split(" ")
    assert (word, its_token) == (STARTED, token)
    assert int(group) > 1
    return rest


def seen(shell, *words, cwd=None, env=None, ship=False):
    argv = (sys.executable, "-ISc", SEES, *words)
    command = Command(argv=argv, cwd=cwd, env=env or {})
    return json.loads(run(shell, command, ship=ship))


@pytest.mark.parametrize("shell", SHELLS, ids=NAMES)
class TestShells:
    @pytest.mark.parametrize("ship", [False, True])
    def test_odd_words(self, shell, ship):
        env = {f"T_{number}": word for number, word in enumerate(ODD)}
        argv, _, its_env, leads = seen(shell, *ODD, env=env, ship=ship)
        assert argv == ODD
        assert its_env == env
        assert leads

    def test_a_line_for_any_shell(self, shell):
        words = [*ODD, "!x", "100%d", "\\041"]
        line = for_any_shell(command_line(Command(argv=("printf", r"%s\0", *words)), "t"))
        done = subprocess.run([*shell, line], capture_output=True, check=True)
        said = done.stdout.partition(b"\n")[2]
        assert said == b"".join(os.fsencode(word) + b"\0" for word in words)
        inside = line.removeprefix('exec /bin/sh -c \'eval "$(printf %b "').removesuffix('")"\'')
        assert not set(inside) & set("'\"`$!%\n{}[]()<>|&;*?~#^")

    def test_odd_folders(self, shell, tmp_path):
        for name in ("-x", "a b", "it's", "new\nline", "$HOME", "é"):
            folder = tmp_path / name
            folder.mkdir()
            assert seen(shell, cwd=str(folder))[1] == str(folder)

    def test_a_folder_whose_name_means_something_to_cd(self, shell, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "-").mkdir()
        assert seen(shell, cwd="-")[1] == str(tmp_path / "-")

    def test_what_is_shipped_leaves_the_rest_of_the_input(self, shell):
        line, ahead = shipped(Command(argv=("cat",)), "t")
        done = subprocess.run(
            [*shell, line], input=ahead + b"rest", capture_output=True, check=True
        )
        assert done.stdout.partition(b"\n")[2] == b"rest"

    def test_a_dd_that_does_not_know_full_blocks(self, shell, tmp_path, monkeypatch):
        dd = shutil.which("dd")
        (tmp_path / "dd").write_text(
            f'#!/bin/sh\ncase "$*" in *fullblock*) exit 1;; esac; exec {dd} "$@"'
        )
        (tmp_path / "dd").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert seen(shell, "a b", ship=True)[0] == ["a b"]

    def test_a_program_that_is_not_there(self, shell):
        line = command_line(Command(argv=("no such program",)), "t")
        done = subprocess.run([*shell, line], capture_output=True, check=False)
        assert done.returncode == 127
        assert done.stdout.startswith(b"vmsandbox-started t ")

    def test_a_folder_that_is_not_there(self, shell):
        line = command_line(Command(argv=("true",), cwd="/no/such folder"), "t")
        done = subprocess.run([*shell, line], capture_output=True, check=False)
        assert done.returncode == 126
        assert b"vmsandbox-started" not in done.stdout

    def test_standard_input_is_the_programs(self, shell):
        line = command_line(Command(argv=("cat",)), "t")
        done = subprocess.run([*shell, line], input=b"in\0put", capture_output=True, check=True)
        assert done.stdout.partition(b"\n")[2] == b"in\0put"

    def test_makes_a_process_group_where_there_is_none(self, shell):
        line = command_line(Command(argv=(sys.executable, "-ISc", SEES)), "t")
        done = subprocess.run([*shell, line], capture_output=True, check=True)
        assert json.loads(done.stdout.decode().partition("\n")[2])[3] is True


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(WORDS, max_size=4), value=WORDS)
def test_any_word_arrives_as_it_is(words, value):
    argv, _, env, _ = seen(SHELLS[0], *words, env={"T_X": value})
    assert argv == words
    assert env == {"T_X": value}


@pytest.mark.parametrize(
    "command",
    [
        Command(argv=("a\0b",)),
        Command(argv=("a",), cwd="/\0"),
        Command(argv=("a",), env={"A": "\0"}),
    ],
)
def test_a_nul_is_refused(command):
    with pytest.raises(ValueError, match="NUL"):
        command_line(command, "t")


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "A;id", "é", "A\n", "a.b"])
def test_an_impossible_name_is_refused(name):
    with pytest.raises(ValueError, match="name for an environment variable"):
        command_line(Command(argv=("a",), env={name: "x"}), "t")


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can become somebody else"
)
@pytest.mark.parametrize("shell", SHELLS, ids=NAMES)
class TestUser:
    def run(self, shell, *argv, cwd="/", env=None, user="nobody", ship=False):
        command = Command(argv=argv, cwd=cwd, env=env or {}, user=user)
        return run(shell, command, ship=ship)

    @pytest.mark.parametrize("ship", [False, True])
    def test_becomes_somebody_else(self, shell, ship):
        assert self.run(shell, "id", "-un", ship=ship) == "nobody\n"

    def test_words_arrive_as_they_are(self, shell):
        env = {"T_X": "it's $HOME"}
        words = "".join(f"<{word}>" for word in ODD)
        printed = self.run(shell, "printf", "<%s>", *ODD)
        assert printed == words
        assert self.run(shell, "sh", "-c", 'printf %s "$T_X"', env=env) == "it's $HOME"

    def test_a_user_who_is_not_there(self, shell):
        line = command_line(Command(argv=("true",), user="no-such-user"), "t")
        done = subprocess.run([*shell, line], capture_output=True, check=False)
        assert done.returncode != 0
        assert b"vmsandbox-started" not in done.stdout


def test_a_group_is_killed():
    assert kill_line(123, "TERM") == "kill -TERM -123"
