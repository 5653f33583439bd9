"""The README's commands for installing, literally, on a clean Debian that has nothing but Python.

It makes a clean root with mmdebstrap, enters it by pivot_root in mount, PID, UTS and IPC
namespaces of its own (in a plain chroot the kernel refuses user namespaces, which building an
image as an ordinary user needs), puts a clean clone of the project there and runs the commands,
as root or as an ordinary user with sudo. The first one that fails ends it; its status is ours.

    python3 tests/cleanroom/run.py --suite trixie --as user

Needs root, mmdebstrap, git and util-linux. Nothing of it is left when it ends, however it ends:

    this program          holds a pipe, which closes however it ends
      └── keeper            owns the folder; kills what is below then
            └── unshare     takes PID 1 of the namespaces along when it dies
                  └── PID 1 makes the root, enters it, runs the commands, reaps orphans
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).resolve().parents[2]
PREFIX = "vmsandbox-cleanroom-"
SUITES = ("bookworm", "noble", "trixie")
COMPONENTS = {"noble": "main,universe"}  # Ubuntu's; the image tools are in the second one
USER = "tester"
USER_ID = 1000
SUBORDINATE_IDS = "100000-165535"
DEVICES = ("full", "kvm", "null", "random", "tty", "urandom", "zero")
DEVICE_LINKS = {
    "fd": "/proc/self/fd",
    "ptmx": "pts/ptmx",
    "stderr": "/proc/self/fd/2",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
OWN_CERTIFICATES = Path("/usr/local/share/ca-certificates")
PROXY = re.compile(r"(?i:(https?|ftp|all|no)_proxy)")
KILLED = 128


def main() -> None:
    """The outermost process: hands everything to the keeper and waits for it."""
    options = parse_arguments()
    if options.inside:
        inside(options)
    if os.geteuid() != 0:
        sys.exit("cleanroom: needs root (it makes namespaces and a file system)")
    for program in ("git", "mmdebstrap", "pivot_root", "setpriv", "unshare"):
        if not shutil.which(program):
            sys.exit(f"cleanroom: needs {program}")
    options.commands = options.commands or readme_commands()
    remove_leftovers(Path(options.work))

    alive, ours = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(ours)
        os.setsid()  # a Ctrl-C at the terminal reaches the keeper as the end of the pipe
        os._exit(keep(options, alive))
    os.close(alive)

    def let_go(*_: object) -> None:
        with suppress(OSError):  # a second signal
            os.close(ours)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, let_go)
    _, status = os.waitpid(keeper, 0)
    sys.exit(exit_status(os.waitstatus_to_exitcode(status)))


def parse_arguments() -> argparse.Namespace:
    """The command line; what PID 1 needs travels in the same form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SUITES, default=SUITES[-1])
    parser.add_argument("--as", dest="who", choices=("root", "user"), default="user")
    parser.add_argument(
        "--user", dest="who", action="store_const", const="user", help="the same as --as user"
    )
    parser.add_argument(
        "--commands",
        nargs="+",
        metavar="COMMAND",
        help="run these instead of the README's",
    )
    parser.add_argument("--dirty", action="store_true", help="take what is not committed yet along")
    parser.add_argument(
        "--work",
        default="/var/tmp",
        metavar="DIR",
        help="where the root lies (default: %(default)s)",
    )
    parser.add_argument("--inside", metavar="DIR", help=argparse.SUPPRESS)
    return parser.parse_args()


def readme_commands() -> list[str]:
    """The commands of the README that its comments leave to us."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(
        r"^<!-- not run: .*tests/cleanroom.*-->\n```console\n(.*?)^```$",
        text,
        re.MULTILINE | re.DOTALL,
    )
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    if not commands:
        sys.exit("cleanroom: README.md has no console block that is left to tests/cleanroom")
    return commands


# ---------------------------------------------------------------------------------------------
# The keeper: owns the folder and everything that runs below


def keep(options: argparse.Namespace, alive: int) -> int:
    """Make the folder, run PID 1, and remove the folder whatever happens; the exit status."""
    started = time.monotonic()
    with locked(Path(options.work)):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=options.work))
        owned = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(owned, fcntl.LOCK_EX)  # until our end: the folder has an owner
    try:
        folder.chmod(0o755)
        copy_project(folder / "project", dirty=options.dirty)
        (folder / "commands.json").write_text(json.dumps(options.commands), encoding="utf-8")
        argv = [
            *("setpriv", "--pdeathsig", "KILL", "--"),  # so that it ends with us, too
            "unshare",
            *("--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"),
            *("--mount-proc", "--uts", "--ipc", "--"),
            *(sys.executable, "-I", str(Path(__file__).resolve())),
            *("--suite", options.suite, "--as", options.who, "--inside", str(folder)),
        ]
        status = supervise(subprocess.Popen(argv, stdin=subprocess.DEVNULL), alive)
    except subprocess.CalledProcessError as error:
        say(f"failed: {shlex.join(map(str, error.cmd))}")
        status = 1
    finally:
        remove(folder)
    say(f"exit status {status} after {time.monotonic() - started:.0f} s")
    return status


def supervise(process: subprocess.Popen[bytes], alive: int) -> int:
    """Wait for `process`; kill it when the other end of `alive` is gone. Its exit status."""
    ended = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([ended, alive], [], [])
        if ended not in readable:
            process.kill()
            process.wait()
            return KILLED + signal.SIGTERM
    finally:
        os.close(ended)
    return exit_status(process.wait())


def exit_status(code: int) -> int:
    """What a shell would make of Python's negative numbers for signals."""
    return code if code >= 0 else KILLED - code


def copy_project(target: Path, *, dirty: bool) -> None:
    """A clean clone of what is committed; with `dirty`, of what would be."""
    git = ["git", "-C", str(PROJECT), "-c", f"safe.directory={PROJECT}"]
    subprocess.run(
        [*git[:1], "clone", "--quiet", "--no-hardlinks", str(PROJECT), str(target)], check=True
    )
    if not dirty:
        return
    for path in target.iterdir():
        if path.name != ".git":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, copy = PROJECT / name, target / name
        if source.is_symlink() or source.exists():  # else it was deleted
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def remove(folder: Path) -> None:
    """Delete a root. What had been mounted below it went away with its namespace."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    below = [line for line in mounts if line.split()[4].startswith(f"{folder}/")]
    if below:
        say(f"left alone, since something is mounted below: {folder}")
        return
    for _ in range(20):  # what was killed a moment ago may still write its last file
        if not subprocess.run(["rm", "-rf", "--one-file-system", folder], check=False).returncode:
            return
        time.sleep(0.1)


def remove_leftovers(work: Path) -> None:
    """Delete the folders of keepers that were killed themselves."""
    with locked(work):
        for folder in work.glob(f"{PREFIX}*"):
            try:
                with locked(folder, wait=False):
                    remove(folder)
            except BlockingIOError:
                continue  # its keeper is alive


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock on a folder; BlockingIOError if it is taken and we do not wait."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# PID 1 of the namespaces


def inside(options: argparse.Namespace) -> NoReturn:
    """Make the root, enter it, run the commands."""
    folder = Path(options.inside)
    root = folder / "root"
    user = options.who == "user"
    commands = json.loads((folder / "commands.json").read_text(encoding="utf-8"))
    timings = [("a clean root", make_root(root, options.suite, with_sudo=user))]
    home = Path("/home", USER) if user else Path("/root")
    shutil.move(folder / "project", root / home.relative_to("/") / "project")
    if user:
        add_user(root, home)
    environment = {
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "LOGNAME": USER if user else "root",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "SHELL": "/bin/bash",
        "TERM": "dumb",
        "USER": USER if user else "root",
        **network_environment(),
    }
    enter(root)
    status = 0
    for command in commands:
        say(f"{options.suite}, as {options.who} $ {command}")
        started = time.monotonic()
        status = run_command(
            command, identity=USER_ID if user else 0, cwd=home / "project", environment=environment
        )
        timings.append((command, time.monotonic() - started))
        if status:
            break
    for what, seconds in timings:
        say(f"{seconds:7.1f} s  {what}")
    sys.stdout.flush()
    os._exit(status)  # this Python's own files are out of reach by now


def make_root(root: Path, suite: str, *, with_sudo: bool) -> float:
    """A minimal Debian (or Ubuntu) with python3, certificates, and sudo for who needs it; seconds taken."""
    started = time.monotonic()
    packages = ["apt", "python3", "ca-certificates", *(["sudo"] if with_sudo else [])]
    say(f"making a clean root: {suite} with {' '.join(packages)}")
    mmdebstrap = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(packages)}"]
    mmdebstrap += [f"--components={COMPONENTS[suite]}"] if suite in COMPONENTS else []
    call([*mmdebstrap, suite, str(root)])
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    (root / "etc/hostname").write_text("cleanroom\n", encoding="utf-8")
    (root / "etc/hosts").write_text("127.0.0.1 localhost cleanroom\n", encoding="utf-8")
    if OWN_CERTIFICATES.is_dir():
        shutil.copytree(
            OWN_CERTIFICATES, root / OWN_CERTIFICATES.relative_to("/"), dirs_exist_ok=True
        )
        call(["chroot", str(root), "update-ca-certificates", "--fresh"], quiet=True)
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
    return time.monotonic() - started


def add_user(root: Path, home: Path) -> None:
    """An ordinary user as Debian's installer makes one: subordinate ids, and sudo."""
    project = root / home.relative_to("/") / "project"
    kept = project.rename(root / "project")
    project.parent.rmdir()
    chroot = ["chroot", str(root)]
    call([*chroot, "useradd", "--create-home", "--shell=/bin/bash", f"--uid={USER_ID}", USER])
    if not (root / "etc/subuid").read_text(encoding="utf-8"):
        ranges = [f"--add-subuids={SUBORDINATE_IDS}", f"--add-subgids={SUBORDINATE_IDS}"]
        call([*chroot, "usermod", *ranges, USER])
    kept.rename(project)
    call([*chroot, "chown", "-R", f"{USER}:{USER}", str(home)])
    rule = root / "etc/sudoers.d" / USER
    rule.write_text(f"{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n", encoding="utf-8")
    rule.chmod(0o440)


def network_environment() -> dict[str, str]:
    """What of our environment says how to reach the network: proxies and certificates."""
    places = {str(CERTIFICATES), str(CERTIFICATES.parent)}
    return {
        name: value
        for name, value in os.environ.items()
        if value in places or PROXY.fullmatch(name)
    }


def enter(root: Path) -> None:
    """Mount what a running system has, and make `root` the root of this namespace."""
    call(["hostname", "cleanroom"])
    call(["mount", "--bind", str(root), str(root)])
    call(["mount", "-t", "proc", "-o", "nosuid,nodev,noexec", "proc", str(root / "proc")])
    call(["mount", "--rbind", "/sys", str(root / "sys")])
    call(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,mode=1777", "tmp", str(root / "tmp")])
    call(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,mode=755", "run", str(root / "run")])
    (root / "run/lock").mkdir(mode=0o777)
    (root / "run/lock").chmod(0o1777)
    make_devices(root / "dev")
    old = root / "mnt"
    os.chdir(root)
    call(["pivot_root", str(root), str(old)])
    os.chroot(".")
    os.chdir("/")
    call(["umount", "--lazy", "/mnt"])


def make_devices(dev: Path) -> None:
    """A /dev with what every machine has, and KVM if this one has it."""
    call(["mount", "-t", "tmpfs", "-o", "nosuid,mode=755", "dev", str(dev)])
    for name in DEVICES:
        source = Path("/dev", name)
        if source.exists():
            (dev / name).touch()
            call(["mount", "--bind", str(source), str(dev / name)])
    for name, target in DEVICE_LINKS.items():
        (dev / name).symlink_to(target)
    (dev / "pts").mkdir()
    (dev / "shm").mkdir()
    call(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=666", "devpts", str(dev / "pts")])
    call(["mount", "-t", "tmpfs", "-o", "nosuid,nodev,mode=1777", "shm", str(dev / "shm")])


def run_command(command: str, *, identity: int, cwd: Path, environment: dict[str, str]) -> int:
    """One line of shell; reaps orphans while it waits. The line's exit status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([identity])
            os.setgid(identity)
            os.setuid(identity)
            os.chdir(cwd)
            os.umask(0o022)
            os.execve("/bin/bash", ["bash", "-c", command], environment)
        finally:
            os._exit(127)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return exit_status(os.waitstatus_to_exitcode(status))


def call(argv: Sequence[str], *, quiet: bool = False) -> None:
    """Run a program that must end well."""
    output = subprocess.DEVNULL if quiet else None
    status = subprocess.run(argv, check=False, stdout=output, stderr=output).returncode
    if status:
        say(f"failed with status {status}: {shlex.join(argv)}")
        sys.exit(1)


def say(text: str) -> None:
    """A line of ours among the output of others."""
    print(f"cleanroom: {text}", flush=True)


if __name__ == "__main__":
    main()
