"""How a guest without a helper gets one: the scripts, in a small root file system; and what decides."""

import json
import os
import re
import subprocess
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vmsandbox.core.deadline import Deadline, wall
from pytest_vmsandbox.core.errors import CommandTimeout, ConfigError, ImageError
from pytest_vmsandbox.guests.cloning import making as cloning
from pytest_vmsandbox.guests.reaching import commands, helper_scripts, helper_setup
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.helper_setup import HelperSetup, NoHelperError, variables
from pytest_vmsandbox.guests.running import machines
from pytest_vmsandbox.guests.running.restarts import Restarts

_ROOTS = "etc|run|proc|sys|usr/lib|usr/local/lib|opt|var|tmp|root|dev/shm|service"
PROGRAM = b"#!/bin/sh\nexit 0\n"


@pytest.fixture
def root(tmp_path):
    """A root file system with the helper's port, and programs that note how they are called."""
    for folder in ("etc", "run", "proc/1", "sys/class/virtio-ports/vport0p1", "usr/lib", "bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "sys/class/virtio-ports/vport0p1/name").write_text("vmsandbox.helper\n")
    (tmp_path / "proc/1/comm").write_text("init\n")
    (tmp_path / "proc/1/exe").symlink_to("/sbin/init")
    for name in ("systemctl", "rc-update", "rc-service", "openrc-run", "telinit", "kill", "setsid"):
        program(tmp_path, name)
    program(tmp_path, "modprobe", "echo no such module >&2; exit 1")
    (tmp_path / "bin/initctl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/initctl").chmod(0o755)
    return tmp_path


def program(root, name, does=":"):
    """A program that notes its call, and does something."""
    file = root / "bin" / name
    file.write_text(f'#!/bin/sh\necho "{name} $*" >>{root}/calls\n{does}\n')
    file.chmod(0o755)


def run(root, script, *arguments, given=b"", shell=()):
    """Run a script with `root` as its root file system. Returns what it prints, as lines."""
    script = re.sub(rf"(?<![\w}}/.])/(?={_ROOTS}\b)", f"{root}/", script)
    done = subprocess.run(
        [
            *(shell or ["/bin/sh"]),
            "-c",
            script.replace("kill -HUP", f"{root}/bin/kill -HUP"),
            "sh",
            *arguments,
        ],
        input=given,
        env={**os.environ, "PATH": f"{root}/bin:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(line.split("=", 1) for line in done.stdout.decode().splitlines() if "=" in line)


def place(root, content=PROGRAM, size=None):
    words = str(len(content) if size is None else size)
    return run(root, helper_scripts.PLACE, words, given=content)


class TestPlace:
    def test_the_first_folder_is_enough(self, root):
        found = place(root)
        assert found == {"place": f"{root}/usr/lib/vmsandbox"}
        file = root / "usr/lib/vmsandbox/helper"
        assert file.read_bytes() == PROGRAM
        assert file.stat().st_mode & 0o777 == 0o755
        assert [*(root / "run").iterdir()] == []

    def test_a_folder_that_cannot_be_made_is_passed_over(self, root):
        (root / "usr/lib/vmsandbox").write_text("in the way")
        assert place(root) == {"place": f"{root}/usr/local/lib/vmsandbox"}

    def test_a_program_that_runs_only_elsewhere(self, root):
        content = b"#!/bin/sh\ncase $0 in */opt/*) exit 0 ;; esac\nexit 126\n"
        assert place(root, content) == {"place": f"{root}/opt/vmsandbox"}
        assert [*(root / "usr/lib/vmsandbox").iterdir()] == []

    def test_a_program_that_runs_nowhere(self, root):
        found = place(root, b"#!/bin/sh\nprintf 'bad\\033 system call\\nmore\\n' >&2\nexit 159\n")
        assert found["failed"] == "run"
        first = f"{root}/usr/lib/vmsandbox/helper ended with status 159 (bad system call); "
        assert found["why"].startswith(first)

    def test_half_of_the_program(self, root):
        found = place(root, size=len(PROGRAM) + 1)
        assert found == {"failed": "place", "why": f"there is no room for it in {root}/run"}


def install(root, *shell):
    folder = root / "usr/lib/vmsandbox"
    folder.mkdir(exist_ok=True)
    found = run(root, helper_scripts.INSTALL, str(folder), shell=shell)
    calls = root / "calls"
    return found, calls.read_text() if calls.exists() else ""


def started(root):
    """The program that was started in the background, once it has noted its call."""
    deadline = Deadline(10)
    while not (root / "calls").exists() or "setsid" not in (root / "calls").read_text():
        assert not deadline.expired
        deadline.pause(0.01)
    return (root / "calls").read_text().splitlines()[-1]


class TestInstall:
    def test_systemd(self, root):
        (root / "run/systemd/system").mkdir(parents=True)
        (root / "etc/systemd/system").mkdir(parents=True)
        found, calls = install(root)
        assert found == {"way": "systemd"}
        unit = root / "etc/systemd/system/vmsandbox-helper.service"
        assert f"ExecStart=/bin/sh {root}/usr/lib/vmsandbox/start once\n" in unit.read_text()
        wanted = unit.parent / "sysinit.target.wants/vmsandbox-helper.service"
        assert wanted.resolve() == unit
        assert calls == "systemctl daemon-reload\nsystemctl start vmsandbox-helper.service\n"

    def test_systemd_whose_own_folder_is_read_only(self, root):
        (root / "run/systemd/system").mkdir(parents=True)
        found, _ = install(root)
        assert found == {"way": "systemd"}
        assert (root / "run/systemd/system/vmsandbox-helper.service").exists()

    def test_systemd_that_may_not_start_it(self, root):
        (root / "run/systemd/system").mkdir(parents=True)
        program(root, "systemctl", '[ "$1" != start ]')
        program(root, "journalctl", "echo Permission denied")
        found, _ = install(root)
        assert found == {"not": "systemd: Permission denied", "way": "hand"}
        assert started(root) == f"setsid {root}/usr/lib/vmsandbox/start"
        assert not (root / "run/systemd/system/vmsandbox-helper.service").exists()

    def test_openrc(self, root):
        (root / "run/openrc").mkdir()
        (root / "etc/init.d").mkdir()
        (root / "etc/inittab").write_text("::sysinit:/sbin/openrc sysinit\n")
        found, calls = install(root)
        assert found == {"way": "openrc"}
        service = root / "etc/init.d/vmsandbox-helper"
        assert service.read_text().startswith(f"#!{root}/bin/openrc-run\n")
        assert f'command="{root}/usr/lib/vmsandbox/start"\n' in service.read_text()
        assert os.access(service, os.X_OK)
        assert calls == (
            "rc-update add vmsandbox-helper default\nrc-service vmsandbox-helper start\n"
        )

    def test_runit(self, root):
        (root / "proc/1/comm").write_text("runit\n")
        (root / "etc/service").mkdir()
        found, _ = install(root)
        assert found == {"way": "runit"}
        runs = (root / "etc/service/vmsandbox-helper").readlink()
        assert runs == root / "etc/sv/vmsandbox-helper"
        assert (runs / "run").read_text().endswith(f"exec {root}/usr/lib/vmsandbox/start once\n")

    def test_sysvinit(self, root):
        """It starts before what the runlevel waits for, and only once."""
        table = root / "etc/inittab"
        table.write_text("# l0:0:wait:x\nid:2:initdefault:\nl2:2:wait:/etc/init.d/rc 2\nlast")
        install(root)
        found, calls = install(root)
        assert found == {"way": "inittab"}
        assert table.read_text().splitlines() == [
            "# l0:0:wait:x",
            "id:2:initdefault:",
            f"vmsb:0123456:respawn:{root}/usr/lib/vmsandbox/start once",
            "l2:2:wait:/etc/init.d/rc 2",
            "last",
        ]
        assert calls == "telinit q\n" * 2
        assert not (root / "etc/inittab.new").exists()

    def test_busybox(self, root):
        (root / "proc/1/exe").unlink()
        (root / "proc/1/exe").symlink_to("/bin/busybox")
        (root / "etc/inittab").write_text("::sysinit:/etc/rc\n")
        found, calls = install(root)
        assert found == {"way": "busybox"}
        lines = (root / "etc/inittab").read_text().splitlines()
        assert lines[-1] == f"::respawn:{root}/usr/lib/vmsandbox/start once"
        assert calls == "kill -HUP 1\n"

    def test_rc(self, root):
        script = root / "etc/rc.local"
        script.write_text("#!/bin/sh -e\nexit 0\n")
        script.chmod(0o755)
        found, _ = install(root)
        assert found == {"way": "rc"}
        line = f"{root}/usr/lib/vmsandbox/start </dev/null >/dev/null 2>&1 &"
        assert script.read_text() == f"#!/bin/sh -e\n{line}\nexit 0\n"
        assert script.stat().st_mode & 0o777 == 0o755
        assert started(root) == f"setsid {root}/usr/lib/vmsandbox/start"

    def test_no_init_and_another_shell(self, root):
        found, _ = install(root, "bash", "--posix")
        assert found == {"way": "hand"}
        assert started(root) == f"setsid {root}/usr/lib/vmsandbox/start"

    def test_no_port(self, root):
        (root / "sys/class/virtio-ports/vport0p1/name").write_text("org.qemu.guest_agent.0\n")
        program(root, "sleep")
        found, calls = install(root)
        assert found == {"failed": "port", "why": "no such module"}
        assert calls.startswith("modprobe virtio_console\n")


class Guest:
    """A guest that answers SSH, and its helper, which says hello when it is started."""

    def __init__(self, **found):
        self.found = {
            "system": "Linux",
            "machine": "x86_64",
            "user": "0",
            "place": "/p",
            "way": "openrc",
        }
        self.found |= found
        self.commands = []
        self.refused = []
        self.is_there = False
        self.says_hello = True
        self.environment = "PATH=/run/current-system/sw/bin\nHOME=/root\nLANG=C\n"
        self.changed = threading.Condition()

    def check(self):
        pass

    def start(self, command, login):
        if login in self.refused:
            raise commands.cannot_log_in(login)
        self.commands.append((login, command))
        script = command.argv[command.argv.index("-c") + 1] if "-c" in command.argv else ""

        def communicate(stdin, stdout, stderr, timeout):
            given = stdin.read()
            if command.argv[0] == "sudo":
                return 1
            if command.argv == ("env",):
                stdout(self.environment.encode())
            else:
                stdout("".join(f"{k}={v}\n" for k, v in self._printed(script, given)).encode())
            return 0

        return SimpleNamespace(communicate=communicate, close=lambda: None)

    def _printed(self, script, given):
        names = {
            helper_scripts.LOOK: ("system", "machine", "user"),
            helper_scripts.PLACE: ("place",),
        }
        if given == helper_scripts.INSTALL.encode():
            self.is_there = self.says_hello
            return [("way", self.found["way"])]
        failed = (
            [("failed", self.found["failed"]), ("why", "because; ")]
            if "failed" in self.found
            else []
        )
        if script == helper_scripts.PLACE and failed:
            return failed
        return [(name, self.found[name]) for name in names.get(script, ())]


def begins(communicate):
    """What starts a program that does so."""
    process = SimpleNamespace(communicate=communicate, close=lambda: None)
    return lambda command, login: process


@pytest.fixture
def setup(tmp_path, monkeypatch):
    file = tmp_path / "helper"
    file.write_bytes(PROGRAM)
    monkeypatch.setattr(helper_setup, "helper_program", lambda *_, **__: file)
    monkeypatch.setattr(helper_setup, "_HELLO_SECONDS", 0.01)
    return HelperSetup(tmp_path, ("tester",), strict=True)


def give(setup, guest):
    setup.give(guest, guest.start, float)


class TestGiving:
    def test_what_is_known_then(self, setup):
        guest = Guest()
        give(setup, guest)
        kept = {"PATH": "/run/current-system/sw/bin", "LANG": "C"}
        assert setup.record() == {
            "way": "openrc",
            "environments": {"root": kept, "tester": kept},
        }
        command = setup.in_environment(Command(argv=("x",), env={"LANG": "de"}), "tester")
        assert command.env == {"PATH": "/run/current-system/sw/bin", "LANG": "de"}
        other = Command(argv=("x",))
        assert setup.in_environment(other, "nobody") is other

    def test_a_user_who_becomes_root(self, setup):
        """Root may not log in, and there is doas but no sudo."""
        guest = Guest()
        guest.refused = ["root"]
        give(setup, guest)
        words = [command.argv[:3] for login, command in guest.commands if login == "tester"]
        assert words.count(("doas", "-n", "/bin/sh")) == 3
        assert "root" not in setup.environments

    @pytest.mark.parametrize(
        ("found", "reason", "text"),
        [
            ({"system": "FreeBSD"}, "system", "this is FreeBSD"),
            ({"machine": "mips"}, "architecture", r"processor \(mips\)"),
            ({"failed": "run"}, "run", "cannot run in it: because$"),
            ({"failed": "place"}, "place", "no place for the helper in it: because$"),
        ],
    )
    def test_why_not(self, setup, found, reason, text):
        guest = Guest(**found)
        with pytest.raises(NoHelperError, match=text) as raised:
            give(setup, guest)
        assert raised.value.reason == reason
        assert setup.record() == {}

    def test_a_guest_that_says_more_than_enough(self, setup, monkeypatch):
        monkeypatch.setattr(helper_setup, "_RETURN_SECONDS", 0.01)
        guest = Guest(way="openrc\n" + "x" * 100_000)
        give(setup, guest)
        assert setup.way == "openrc"
        guest = Guest(place="")
        with pytest.raises(NoHelperError, match="said nothing"):
            give(setup, guest)

    def test_a_guest_that_never_stops_printing(self, setup):
        """It is an error at once, and not at the end of a limit."""

        def communicate(stdin, stdout, stderr, timeout):
            while True:
                stdout(b"x" * 65_536)

        with pytest.raises(NoHelperError, match=r"more than 1 ?MiB while"):
            setup.give(Guest(), begins(communicate), float)

    @pytest.mark.parametrize("step", ["login", "script"])
    def test_a_silent_guest(self, setup, monkeypatch, step):
        """All logins and scripts have one limit, and people are told once what is waited for."""
        monkeypatch.setattr(helper_setup, "_LOOK_SECONDS", 2.0)
        monkeypatch.setattr(helper_setup, "_SPARE_SECONDS", 0.0)
        monkeypatch.setattr(helper_setup, "_WORD_SECONDS", 0.0)
        said, limits, over = [], [], threading.Event()
        setup.say = said.append

        def communicate(stdin, stdout, stderr, timeout):
            limits.append(timeout)
            over.wait(0.4)  # so the caller looks whether it is still there
            raise CommandTimeout("sh did not end", seconds=timeout)

        start = begins(communicate)
        if step == "login":
            setup.users = ()
            monkeypatch.setattr(helper_setup, "_LOOK_SECONDS", 0.4)
            start = lambda *_: over.wait(5)  # noqa: E731
        with pytest.raises(NoHelperError, match=r"did not end within [\d.]+ s") as raised:
            setup.give(Guest(), start, float)
        over.set()
        assert raised.value.reason == "silent"
        assert len(limits) == (step == "script")
        assert all(limit <= 2.0 for limit in limits)
        assert len(said) == 1
        assert said[0].startswith("waiting for the guest's shell")

    def test_later_scripts_share_what_is_left(self, setup, monkeypatch):
        monkeypatch.setattr(helper_setup, "_SECONDS", 30.0)
        guest, limits = Guest(), []
        began = guest.start

        def start(command, login):
            process = began(command, login)

            def communicate(stdin, stdout, stderr, timeout):
                limits.append(timeout)
                return process.communicate(stdin, stdout, stderr, timeout)

            return SimpleNamespace(communicate=communicate, close=process.close)

        setup.give(guest, start, float)
        assert limits[1:] == sorted(limits[1:], reverse=True)
        assert limits[1] <= 30.0
        assert len(set(limits[1:])) == len(limits) - 1

    def test_control_characters_of_a_guest(self, setup):
        """They reach neither a command nor a terminal."""
        guest = Guest(place="/p\0q")
        give(setup, guest)
        places = [command.argv[-1] for _, command in guest.commands if "/p" in command.argv[-1]]
        assert places == ["/p\N{REPLACEMENT CHARACTER}q"]
        with pytest.raises(NoHelperError) as raised:
            give(HelperSetup(setup.cache, (), strict=True), Guest(machine="m\033]0;x\a"))
        assert raised.value.brief.isprintable()

    def test_a_shell_that_breaks_later(self, setup):
        guest = Guest()
        began = guest.start

        def start(command, login):
            if guest.commands:
                guest.refused = ["root"]
            return began(command, login)

        with pytest.raises(NoHelperError, match="'root' cannot log in"):
            setup.give(guest, start, float)

    def test_nobody_becomes_root(self, setup):
        guest = Guest()
        guest.refused = ["root", "tester"]
        with pytest.raises(NoHelperError, match="nobody becomes root") as raised:
            give(setup, guest)
        assert raised.value.reason == "root"
        assert "'tester' cannot log in" in raised.value.details

    def test_no_program_can_be_made(self, setup, monkeypatch):
        def fails(*_, **__):
            raise ImageError("no compiler", remedy="install one")

        monkeypatch.setattr(helper_setup, "helper_program", fails)
        with pytest.raises(NoHelperError, match="no compiler") as raised:
            give(setup, Guest())
        assert (raised.value.reason, raised.value.remedy) == ("program", "install one")

    def test_silence(self, setup):
        guest = Guest()
        guest.says_hello = False
        with pytest.raises(
            NoHelperError, match=r"started in it \(openrc\), but does not"
        ) as raised:
            give(setup, guest)
        assert raised.value.reason == "silent"

    def test_the_init_brings_it_back(self, setup):
        guest = Guest()
        give(setup, guest)
        guest.commands.clear()
        guest.is_there = True
        give(setup, guest)
        assert guest.commands == []

    def test_it_is_put_there_again(self, setup, monkeypatch):
        monkeypatch.setattr(helper_setup, "_RETURN_SECONDS", 0.01)
        guest = Guest()
        give(setup, guest)
        guest.is_there = False
        give(setup, guest)
        assert guest.is_there

    def test_a_guest_of_a_test_lives_on_without_it(self, setup):
        setup.strict = False
        give(setup, Guest(failed="run"))
        assert setup.failure is not None
        give(setup, Guest())
        assert setup.failure is None

    def test_a_helper_of_its_own_that_was_late(self, setup):
        guest = Guest()
        began = guest.start

        def start(command, login):
            guest.is_there = True
            return began(command, login)

        setup.give(guest, start, float)
        assert setup.record() == {}


def test_variables_of_a_login_are_left_out():
    text = "A=1\nHOME=/x\nSSH_TTY=/dev/pts/0\nXDG_RUNTIME_DIR=/run\nB=two\nlines\n=x\nC D=3\nE=\n"
    assert variables(text) == {"A": "1", "B": "two", "E": ""}
    assert list(variables("".join(f"V{n}={'x' * 999}\n" for n in range(9)))) == [
        f"V{n}" for n in range(7)
    ]


def test_variables_that_no_command_can_have_are_left_out():
    text = "A=x\0y\nB=\033[2J\nC=1\r\nD=\u0085E=2\nF=tab\there\nG=é\n"
    found = variables(text)
    assert found == {"F": "tab\there", "G": "é"}
    commands.check_command(Command(argv=("true",), env=found))


def test_the_digest_counts_in_what_identifies_a_template(monkeypatch):
    before = helper_setup.digest()
    monkeypatch.setattr(helper_scripts, "START", "#!/bin/sh\n")
    assert helper_setup.digest.__wrapped__() != before


class TestRunning:
    """What a guest that was given a helper does after a boot."""

    seen: tuple[str, ...] = ()  # events of its machine

    @pytest.fixture
    def running(self, setup):
        helper = Guest()
        running: Any = object.__new__(machines.Running)
        vars(running).update(
            setup=setup,
            resident=helper,
            _transports={},
            _lock=threading.Lock(),
            machine=SimpleNamespace(check=lambda: None, monitor=self),
            blueprint=SimpleNamespace(
                has_way_in=True, stretch=float, built=SimpleNamespace(key=None)
            ),
            answers=lambda _: True,
            start_by_ssh=helper.start,
        )
        running.restarts = Restarts(running.machine, running.resident, setup, 1.0, lambda: None)
        return running

    def test_it_gets_it_again(self, running):
        running.await_answer(Deadline(1))
        assert running.helper is running.resident

    def test_a_restart_that_the_guest_began(self, running):
        """No init starts the helper again, so SSH is left."""
        running.resident.found["way"] = "hand"
        running.resident.close = lambda: setattr(running.resident, "is_there", False)
        running.await_answer(Deadline(1))
        self.seen = ("RESET", "SHUTDOWN")
        running.start(Command(argv=("x",)), "root")
        assert not running.resident.is_there

    def events(self):
        now = {"seconds": wall() + 1, "microseconds": 0}
        return [{"event": name, "timestamp": now} for name in self.seen]

    def test_nobody_asks_where_there_is_one(self, running):
        running.resident.is_there = True
        running.await_answer(Deadline(1))
        assert running.resident.commands == []

    def test_programs_have_the_environment_of_the_user(self, running):
        running.await_answer(Deadline(1))
        running.resident.commands.clear()
        running.resident.start = lambda command, login: (login, dict(command.env))
        ways = {"PATH": "/run/current-system/sw/bin", "LANG": "C"}
        assert running.start(Command(argv=("x",)), "tester") == ("tester", ways)
        named = Command(argv=("x",), user="tester", env={"LANG": "de"})
        assert running.start(named, "root") == ("root", {**ways, "LANG": "de"})

    def test_why_there_is_no_snapshot(self, running):
        running.setup.strict = False
        running.resident.found["failed"] = "run"
        running.await_answer(Deadline(1))
        guests: Any = object.__new__(machines.Machines)
        blueprint = SimpleNamespace(unsaved="")
        vars(guests).update(setup=running.setup, name="x", blueprint=blueprint, plugged={})
        with pytest.raises(ConfigError, match="cannot run in it: because"):
            guests.save(running)


@pytest.mark.parametrize(
    ("init", "given", "key", "expected"),
    [
        ("systemd", False, None, True),
        ("systemd", True, None, True),  # its boot writes them, too
        ("systemd", False, "key", True),
        ("systemd", True, "key", False),  # a system of somebody else
        ("busybox", False, None, False),
    ],
)
def test_whose_files_have_the_name_of_a_clone(setup, init, given, key, expected):
    definition = SimpleNamespace(init=init)
    blueprint: Any = SimpleNamespace(built=SimpleNamespace(definition=definition, key=key))
    assert cloning._has_name_in_files(blueprint, setup if given else None) is expected


def test_what_a_template_keeps_of_it(setup):
    give(setup, Guest())
    definition = SimpleNamespace(user="tester")
    blueprint: Any = SimpleNamespace(
        built=SimpleNamespace(definition=definition), hardware=SimpleNamespace(user="")
    )
    kept = HelperSetup.of(blueprint, setup.cache, json.loads(json.dumps(setup.record())))
    assert (kept.way, kept.environments) == ("openrc", setup.environments)
    assert kept.users == ("tester",)
    assert not kept.strict
    assert HelperSetup.of(blueprint, setup.cache, {}).record() == {}
