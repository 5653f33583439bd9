"""What runs pytest in a guest: a keeper, and the session that it keeps.

This file goes to the guest. It knows the standard library and pytest only, runs on Python 3.9 and
newer, and nobody imports it. It is three programs:

``serve FOLDER``
    The keeper: a small process that outlives sessions. It listens on a socket in FOLDER, an
    endpoint that can be attached to again and again (one at a time), starts sessions by a fork,
    passes messages on, and tells how a session ended. It prints ``listening`` and goes to the
    background.
``attach FOLDER``
    Standard input and output become a connection to the keeper.
``probe``
    Prints what has to be known of this Python to prepare what it needs.

Messages are JSON objects, one a line. To the keeper::

    {"do": "start", "config": {…}}     start a session, see `Session`
    {"do": "signal", "name": "INT"}    to the session's process group (DUMP: show all stacks)
    {"do": "ping", "n": N}             is answered {"pong": N}
    {"do": "run", …}, {"do": "finish"} for the session, passed on
    {"do": "wake", "seed": HEX, "environment": {…}, "fixtures": {…}} likewise, in a guest that was cloned; is
                                       answered {"awake": N}

From it: what the session says, ``{"output": TEXT, "of": 1|2}`` where output is live, and
``{"exit": STATUS, "tail": TEXT}`` when the session has ended (−N: by signal N).

A session shares its interpreter with tests, and a test may patch any name of any module. So the
session uses names of its own: `keep_apart` says how.
"""

from __future__ import annotations

import _thread
import binascii
import builtins
import codecs
import errno
import faulthandler
import fcntl
import io
import json
import linecache
import os
import platform
import random
import select
import signal
import socket
import sys
import traceback
import types

# All functions below look up `len` and its like here, and not where tests patch them.
globals()["__builtins__"] = dict(vars(builtins))

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    import warnings
    from collections.abc import Iterator
    from typing import Any, NoReturn

    import pytest

SOCKET = "socket"
CHUNK = 1 << 16
MAX_QUEUED = 8 << 20  # bytes for the host that wait; more is not read from the session
MAX_TAIL = 16_384  # bytes of what a session wrote last
MAX_TEXT = 4 << 20  # characters of one string in a message
MAX_MESSAGE = 24 << 20  # bytes
ASIDE = 900  # from here on, descriptors are out of the way of tests
NICE = 5  # of what stands between tests and host: several messages then go in one
PIECE = 500  # collected items in one message
MAX_PROPERTIES = 10_000  # of a report: user_properties
MAX_RESULT = 12 << 20  # bytes of a file of allure's
MAX_BENCHMARK = 500_000  # rounds of a benchmark
MAX_SNAPSHOT = 5_000  # files and folders of a tree that a session looks through itself
MAX_ATTRIBUTES = 100  # of a report, that plugins and conftest files have given it
MAX_ATTRIBUTE_BYTES = 6 << 20  # of all of them together, as JSON
MAX_ATTRIBUTE_VALUES = 100_000  # in one of them
MAX_ATTRIBUTE_DEPTH = 20  # of lists and objects in each other
DUMP = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else signal.SIGUSR1


# -- the keeper -----------------------------------------------------------------------------------


class Lines:
    """Lines that arrive in pieces."""

    def __init__(self) -> None:
        self.rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self.rest) + lines[0]
            self.rest.clear()
        self.rest += rest
        return lines


class Keeper:
    """One poll loop: the host's connection, the session's, and the session's output."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.host: socket.socket | None = None
        self.from_host = Lines()
        self.to_host: list[
            bytes
        ] = []  # whole lines; a connection that breaks gets the first one again
        self.sent = 0  # bytes of the first line
        self.session: socket.socket | None = None  # our end of its socket
        self.from_session = Lines()
        self.to_session = b""
        self.pid = 0
        self.outputs: dict[int, int] = {}  # descriptor → 1 or 2
        self.decoders: dict[int, codecs.IncrementalDecoder] = {}
        self.tail = b""
        self.live = False
        wake_read, wake_write = os.pipe()
        for fd in (wake_read, wake_write):
            os.set_blocking(fd, False)
        self.wake, self.awaken = wake_read, wake_write
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    def run(self) -> NoReturn:
        while True:
            poller = select.poll()
            poller.register(self.wake, select.POLLIN)
            poller.register(self.listener, select.POLLIN)
            if self.host is not None:
                poller.register(self.host, select.POLLIN | (select.POLLOUT if self.to_host else 0))
            if sum(map(len, self.to_host)) < MAX_QUEUED:
                for fd in self.outputs:
                    poller.register(fd, select.POLLIN)
                if self.session is not None:
                    poller.register(
                        self.session, select.POLLIN | (select.POLLOUT if self.to_session else 0)
                    )
            ready = dict(poller.poll())
            if self.listener.fileno() in ready:
                self.attach()
            elif self.host is not None and self.host.fileno() in ready:
                self.serve_host(ready[self.host.fileno()])
            for fd in list(self.outputs):
                if fd in ready:
                    self.take_output(fd)
            if self.session is not None and self.session.fileno() in ready:
                self.serve_session(ready[self.session.fileno()])
            if self.wake in ready:
                drain(self.wake)
                self.reap()

    def attach(self) -> None:
        connection, _ = self.listener.accept()
        if self.host is not None:  # somebody else attaches: the former one is gone or forgotten
            self.detach()
        connection.setblocking(False)
        self.host = connection
        # Before what waits for whoever attaches.
        self.to_host.insert(0, json.dumps({"attached": os.getpid()}).encode() + b"\n")
        self.flush()

    def detach(self) -> None:
        if self.host is not None:
            self.host.close()
        self.host, self.sent, self.from_host = None, 0, Lines()

    def serve_host(self, events: int) -> None:
        if events & ~select.POLLOUT:
            data = receive(self.host)
            if not data:
                if data is not None:
                    self.detach()
                return
            for line in self.from_host.feed(data):
                self.obey(line)
        self.flush()

    def flush(self) -> None:
        while self.host is not None and self.to_host:
            try:
                self.sent += self.host.send(memoryview(self.to_host[0])[self.sent :])
            except BlockingIOError:
                return
            except OSError:
                self.detach()
                return
            if self.sent == len(self.to_host[0]):
                del self.to_host[0]
                self.sent = 0

    def obey(self, line: bytes) -> None:
        message = json.loads(line)
        what = message.get("do")
        if what == "ping":
            self.say({"pong": message["n"]})
        elif what == "start":
            self.start(message["config"])
        elif what == "signal":
            if self.pid:
                if message["name"] == "DUMP":  # all stacks are the session's own affair
                    os.kill(self.pid, DUMP)
                else:
                    self.kill(getattr(signal, "SIG" + message["name"]))
        elif self.session is not None:
            self.to_session += line + b"\n"
            self.flush_session()

    def kill(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has gone into another group
            os.kill(self.pid, number)

    def start(self, config: dict[str, Any]) -> None:
        self.end_session()
        ours, theirs = socket.socketpair()
        pipes = {1: os.pipe(), 2: os.pipe()}
        self.tail, self.live = b"", bool(config.get("live"))
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for sock in (ours, self.listener, self.host):
                    if sock is not None:
                        sock.close()
                for fd in (self.wake, self.awaken, *(pipe[0] for pipe in pipes.values())):
                    os.close(fd)
                status = run_session(config, theirs, {n: pipe[1] for n, pipe in pipes.items()})
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)
        try:  # both do it, so that it is done
            os.setpgid(pid, pid)
        except OSError:
            pass
        theirs.close()
        ours.setblocking(False)
        self.session, self.from_session, self.to_session, self.pid = ours, Lines(), b"", pid
        for number, (read, write) in pipes.items():
            os.close(write)
            os.set_blocking(read, False)
            self.outputs[read] = number
            self.decoders[number] = codecs.getincrementaldecoder("utf-8")("replace")

    def flush_session(self) -> None:
        if self.session is None:
            return
        try:
            self.to_session = self.to_session[self.session.send(self.to_session) :]
        except BlockingIOError:
            pass
        except OSError:
            self.to_session = b""  # it is gone; its exit is told

    def serve_session(self, events: int) -> None:
        if events & select.POLLOUT:
            self.flush_session()
        if events & ~select.POLLOUT:
            data = receive(self.session)
            if data:
                self.queue(*[line + b"\n" for line in self.from_session.feed(data)])
            elif data is not None:
                self.hang_up()

    def hang_up(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None

    def take_output(self, fd: int) -> None:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            os.close(fd)
            del self.outputs[fd]
            return
        self.tail = (self.tail + data)[-MAX_TAIL:]
        if self.live:
            number = self.outputs[fd]
            self.say({"output": self.decoders[number].decode(data), "of": number})

    def reap(self) -> None:
        if not self.pid:
            return
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return
        self.pid = 0
        # What it said last. A process that it left behind may hold the ends open: no waiting.
        while self.session is not None:
            data = receive(self.session)
            if data:
                self.queue(*[line + b"\n" for line in self.from_session.feed(data)])
            else:
                self.hang_up()
        for fd in list(self.outputs):
            for _ in range(64):
                if fd in self.outputs:
                    self.take_output(fd)
            if fd in self.outputs:
                os.close(fd)
                del self.outputs[fd]
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self.say({"exit": code, "tail": self.tail.decode("utf-8", "replace")})

    def end_session(self) -> None:
        if self.pid:
            self.kill(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        self.hang_up()
        for fd in self.outputs:
            os.close(fd)
        self.outputs = {}

    def say(self, message: dict[str, Any]) -> None:
        self.queue(json.dumps(message).encode() + b"\n")

    def queue(self, *lines: bytes) -> None:
        self.to_host += lines
        self.flush()


def receive(sock: socket.socket | None) -> bytes | None:
    """What has come; nothing at the end; None if there is just nothing now."""
    if sock is None:
        return None
    try:
        return sock.recv(CHUNK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def drain(fd: int) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except BlockingIOError:
        pass


def serve(folder: str) -> None:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, SOCKET)
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(4)
    print("listening", flush=True)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    protect("-900")  # a session that takes all memory is killed before its keeper
    if os.geteuid() == 0:  # who else could not give a session its share back
        os.nice(NICE)
    Keeper(listener).run()


def protect(score: str) -> None:
    """Tell the kernel whom to kill when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write(score)
    except OSError:
        pass


def attach(folder: str) -> None:
    os.nice(NICE)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(os.path.join(folder, SOCKET))
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(sock, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == 0:
                data = os.read(0, CHUNK)
                sock.sendall(data)
            else:
                data = sock.recv(CHUNK)
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view) :]
            if not data:
                return


def probe() -> None:
    name, version = platform.libc_ver()
    print(
        json.dumps(
            {
                "version": list(sys.version_info[:3]),
                "machine": platform.machine(),
                "libc": [name, version],
                "executable": sys.executable,
            }
        )
    )


# -- the session ----------------------------------------------------------------------------------


def run_session(config: dict[str, Any], wire: socket.socket, outputs: dict[int, int]) -> int:
    """In the child: descriptors, path, environment; then pytest. Returns the exit status."""
    os.setpgid(0, 0)
    protect("0")
    if os.geteuid() == 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    for number, fd in outputs.items():
        os.dup2(fd, number)
        os.close(fd)
    # A descriptor of its own: while a test runs, 2 is pytest's.
    private = aside(os.dup(2))
    # As Python opens them, by the locale.
    sys.stdin = open(0, closefd=False)  # noqa: PLW1514
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: PLW1514
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="backslashreplace")  # noqa: PLW1514
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))
    faulthandler.enable(file=private)
    faulthandler.register(DUMP, file=private, all_threads=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.environ["PATH"] = config["programs"] + os.pathsep + os.environ.get("PATH", os.defpath)
    os.environ.update(config["environment"])
    os.chdir(config["cwd"])
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [*config["path"], *(entry for entry in sys.path if entry != here)]
    sys.argv[:] = ["pytest", *config["args"]]
    measuring = Measuring(config["measure"]) if config.get("measure") else None
    wire = socket.socket(fileno=aside(wire.detach()))

    import pytest

    keep_apart()
    for name in FIRST:
        pytest.hookimpl(tryfirst=True)(getattr(Session, name))
    for name in ("pytest_runtest_call", "pytest_runtest_makereport"):
        pytest.hookimpl(tryfirst=True)(getattr(Calls, name))
    for name in LAST:
        pytest.hookimpl(trylast=True)(getattr(Session, name))
    for name in OUTERMOST:
        pytest.hookimpl(tryfirst=True, hookwrapper=True)(getattr(Session, name))
    session = Session(config, Wire(wire))
    before = snapshot(config["tree"]) if config.get("alone") else None
    plugins = installed_plugins(config["plugins"])
    args = [arg for name in plugins for arg in ("-p", name)] + config["args"]
    ours: list[Any] = [session, fixtures_of(config["fixtures"])]
    if measuring is not None:
        ours.append(measuring.plugin())
    status = int(pytest.main(args, plugins=ours))
    if measuring is not None:
        measuring.tell(session.wire, os.path.realpath(config["tree"]))
    # One that was not woken may be the second in its guest, and has not seen what the first has written.
    if session.awake and before is not None and snapshot(config["tree"]) == before:
        session.wire.say({"untouched": True})
    return status


def snapshot(folder: str) -> dict[str, tuple[int, ...]] | None:
    """What tells whether anything in a folder has changed since; Python's caches are left out.

    None if there is too much, or it cannot be looked at: then somebody else has to look.
    """
    found: dict[str, tuple[int, ...]] = {}
    folders = [folder]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        if entry.name == "__pycache__":
                            continue
                        folders.append(entry.path)
                    status = entry.stat(follow_symlinks=False)
                    found[entry.path] = (
                        (status.st_mode,)  # a cache changes the times of the folder that it is in
                        if is_folder
                        else (status.st_mode, status.st_ino, status.st_size, status.st_ctime_ns)
                    )
                    if len(found) > MAX_SNAPSHOT:
                        return None
    except OSError:
        return None
    return found


def keep_apart() -> None:
    """Let this program use modules of its own from now on: tests may patch all others.

    Each module that is imported above is replaced by a copy. A function in a copy still looks up names
    in the module that it comes from. So while tests run, this program calls only functions that are
    written in C, and those of `json`, whose code is executed once more.

    Some tools patch all that is in `sys.modules`. So this program leaves it: ``__main__`` becomes what
    it is for ``python -m pytest``.
    """
    import importlib.util

    names = globals()
    for name, value in list(names.items()):
        if isinstance(value, types.ModuleType):
            names[name] = types.ModuleType(value.__name__)
            vars(names[name]).update(vars(value))
    vars(json).update(
        dumps=executed_again(json.encoder).JSONEncoder().encode,
        loads=executed_again(json.decoder).JSONDecoder().decode,
    )
    spec = importlib.util.find_spec("pytest.__main__")
    assert spec is not None
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    sys.modules["__main__"] = main


def executed_again(module: Any) -> Any:
    """A module with the same code, in which nobody else can patch a name."""
    again = types.ModuleType(module.__name__)
    vars(again)["__builtins__"] = globals()["__builtins__"]
    exec(module.__spec__.loader.get_code(module.__name__), vars(again))  # noqa: S102
    return again


def aside(fd: int) -> int:
    """Move a file to a descriptor that is out of the way of tests, which may close low ones."""
    lowest = min(ASIDE, os.sysconf("SC_OPEN_MAX") // 2)
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    os.close(fd)
    return moved


def installed_plugins(names: list[str]) -> list[str]:
    """Those of the wanted plugins that are installed here."""
    from importlib.metadata import distributions

    there = {
        point.name
        for distribution in distributions()
        for point in distribution.entry_points
        if point.group == "pytest11"
    }
    return [name for name in names if name in there]


class Measuring:
    """Coverage of a session and of the processes that it starts: what lies in files of its own.

    Args:
        options: coverage's: name → text, or list of texts.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        import shutil
        import tempfile

        import coverage

        self.another, self.remove = coverage.Coverage, shutil.rmtree
        self.folder = tempfile.mkdtemp(prefix="vmsandbox-coverage-")
        settings = os.path.join(self.folder, "settings")
        self.data = os.path.join(self.folder, "data")
        # A file, since processes that tests start read it, too.
        with open(settings, "w", encoding="utf-8") as file:
            file.write("[run]\nparallel = true\ndata_file = %s\n" % self.data)
            for name, value in options.items():
                text = "\n    ".join(["", *value]) if isinstance(value, list) else value
                file.write("%s = %s\n" % (name, text.replace("$", "$$")))
        self.coverage = coverage.Coverage(config_file=settings)
        self.coverage.start()

    def plugin(self) -> types.ModuleType:
        """What tests find of pytest-cov: its fixture that is coverage, and how not to be measured."""
        import pytest

        def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
            names = getattr(item, "fixturenames", ())
            if "no_cover" not in names and item.get_closest_marker("no_cover") is None:
                yield
                return
            self.coverage.stop()
            try:
                yield
            finally:
                self.coverage.start()

        hook = pytest.hookimpl(wrapper=True)(pytest_runtest_call)
        module = types.ModuleType("vmsandbox_coverage")
        vars(module)["pytest_runtest_call"] = hook
        vars(module)["cov"] = pytest.fixture(name="cov")(lambda: self.coverage)
        return module

    def tell(self, wire: Wire, tree: str) -> None:
        """Stop, and tell what was measured of the files of a tree."""
        self.coverage.stop()
        self.coverage.save()
        whole = self.another(data_file=self.data, config_file=False)
        whole.combine()
        data = whole.get_data()
        for name in data.measured_files():
            if name.startswith(tree + "/"):
                kind = "arcs" if data.has_arcs() else "lines"
                message = {"covered": name[len(tree) + 1 :], kind: getattr(data, kind)(name)}
                wire.say(clean(message))
        data.close()
        self.remove(self.folder, ignore_errors=True)


class Wire:
    """The session's end of its connection to the keeper."""

    def __init__(self, sock: socket.socket) -> None:
        # Bound now: a test may patch the methods of sockets.
        self.send, self.receive = sock.sendall, sock.recv
        self.lines = Lines()
        self.waiting: list[bytes] = []
        self.owner = os.getpid()
        self.lock = _thread.RLock()  # threads of tests log, too

    def say(self, message: dict[str, Any]) -> None:
        if os.getpid() != self.owner:  # a test has forked, and its child reports: not to us
            return
        data = json.dumps(message).encode() + b"\n"
        try:
            with self.lock:
                self.send(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise

    def hear(self) -> dict[str, Any] | None:
        """The next message; None when there will be none."""
        if os.getpid() != self.owner:  # the child of a test came back: what comes is not for it
            os._exit(0)
        while not self.waiting:
            data = self.receive(CHUNK)
            if not data:
                return None
            self.waiting += self.lines.feed(data)
        message: dict[str, Any] = json.loads(self.waiting.pop(0).decode())
        return message


class InAnotherGuest(BaseException):
    """The next attempt at a test has a guest of its own: pytest-rerunfailures is to begin none here."""


class Calls:
    """Tells when a test's function begins and ends, which the host may not see in time by reports.

    It is a plugin for the tests that need it: others might show it, in a traceback's arguments.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def pytest_runtest_call(self) -> None:
        self.wire.say({"call": True})

    def pytest_runtest_makereport(self, call: pytest.CallInfo[Any]) -> None:
        if call.when == "call":
            self.wire.say({"call": False})


class Session:
    """The plugin that makes a pytest session run what it is told to.

    Its hooks are put in order by `OUTERMOST`, `FIRST` and `LAST`: pytest cannot be imported before
    the path is set.

    The configuration: ``args`` and ``plugins`` for pytest, ``options`` (name → value) to set, ``ini`` (a list of
    ``[names of a key, value]``),
    ``path`` for `sys.path`, ``junit`` (the family of the host's junit file, if it writes one),
    ``outcomes`` (that plugins of the host know besides pytest's), ``alone`` (whether each attempt at a test has a guest of its own),
    ``measure`` (coverage's options, if it is measured) and ``tree`` (of what), ``fixtures`` (name →
    value), ``programs`` for ``PATH``, ``cwd``, ``environment``, ``details`` (files of whose items all is
    told, since the host could not collect them).

    It says ``{"items": […]}``, each ``[node id, parameters' indices]``; ``{"failed": [[node id,
    report], …]}`` for what could not be collected; ``{"ready": N}``; then, for each item that it
    is told to run, reports, ``{"done": ID, "stop": reason or null}``; if it is ``timed``,
    ``{"call": true}`` and ``{"call": false}`` around its function. ``{"again": true}`` begins another
    attempt at it. At the end of a session that was woken, ``{"untouched": true}`` says that nothing in ``tree`` is
    other than when the session began.
    """

    def __init__(self, config: dict[str, Any], wire: Wire) -> None:
        import pytest
        from _pytest._io import TerminalWriter

        self.mark, self.exit, self.item = pytest.mark, pytest.exit.Exception, pytest.Item
        self.run_failed, self.run_stopped = pytest.Session.Failed, pytest.Session.Interrupted
        self.shown = io.StringIO()
        self.screen = TerminalWriter(self.shown)
        self.settings = config
        self.wire = wire
        self.items: dict[str, pytest.Item] = {}
        self.failed: list[pytest.CollectReport] = []
        self.found: int | None = None  # how many items
        self.outcomes = (*OUTCOMES, *config.get("outcomes", ()))
        self.reruns = False  # whether this attempt at it is followed by another
        self.awake = False  # whether the guest was cloned while this session waited in it
        self.running = ""  # the item that runs
        self.reported: list[str] = []  # its phases, so far

    # -- setting up ---------------------------------------------------------------------------

    def pytest_addhooks(self, pluginmanager: pytest.PytestPluginManager) -> None:
        """The first hook, which comes before pytest reads its first ini key."""
        let_ini_keys_be(pluginmanager.get_plugin("pytestconfig"), self.settings["ini"])
        # Hooks of plugins that stay on the host are unknown here; the host has looked at them.
        vars(pluginmanager)["check_pending"] = lambda: None

    def pytest_load_initial_conftests(self, early_config: pytest.Config) -> None:
        self.set_options(early_config.known_args_namespace)

    def pytest_cmdline_parse(self) -> Iterator[None]:
        """Set the options as soon as pytest has read its own: before any other hook looks at them."""
        outcome: Any = yield
        self.set_options(outcome.get_result().option)

    def set_options(self, option: Any) -> None:
        for name, value in self.settings["options"].items():
            if hasattr(option, name):
                setattr(option, name, unpacked(value))

    def pytest_configure(self, config: pytest.Config) -> None:
        if self.settings.get("junit"):
            from _pytest.junitxml import xml_key

            junit: Any = JUnit(self.settings["junit"], self.wire)
            config.stash[xml_key] = junit
            config.pluginmanager.register(junit)  # or pytest cannot unregister it

    def pytest_sessionstart(self, session: pytest.Session) -> Iterator[None]:
        outcome: Any = yield
        self.tell_failed(outcome.exception)
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:  # it has to be there, but nobody reads it
            nowhere = open(aside(os.open(os.devnull, os.O_WRONLY)), "w", encoding="utf-8")
            reporter._tw = type(self.screen)(nowhere)  # noqa: SLF001

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self.failed.append(report)

    def pytest_collection(self, session: pytest.Session) -> Iterator[None]:
        self.config = session.config
        outcome: Any = yield
        self.tell_failed(outcome.exception)
        if self.found is not None and outcome.exception is None:  # pytest has told warnings, too
            self.wire.say({"ready": self.found})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        rows = []
        detailed = set(self.settings["details"])
        for item in session.items:
            self.items[item.nodeid] = item
            spec = getattr(item, "callspec", None)
            row: list[Any] = [item.nodeid, dict(spec.indices) if spec is not None else None]
            if item.nodeid.partition("::")[0] in detailed:
                marks = [mark.name for mark in item.iter_markers()]
                row.append([list(item.location), sorted(map(str, item.keywords)), marks])
            rows.append(row)
        for start in range(0, len(rows), PIECE):
            self.wire.say({"items": clean(rows[start : start + PIECE])})
        for report in self.failed:
            self.wire.say({"failed": clean([report.nodeid, self.serialized(report)])})
        self.found = len(rows)
        if self.settings.get("logs"):
            send_logs(session.config, self.wire)

    # -- running ------------------------------------------------------------------------------

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        class Pause(self.item):  # type: ignore[name-defined,misc]
            def runtest(self) -> None:
                raise NotImplementedError

        self.pause = Pause.from_parent(session, name="vmsandbox-pause")
        while True:
            message = self.wire.hear()
            if message is None or message["do"] == "finish":
                return True
            if message["do"] == "wake":
                self.wake(message)
                continue
            if self.run(session, message):
                return True

    def wake(self, message: dict[str, Any]) -> None:
        """The guest was cloned while the session waited: be another one than the other clones."""
        self.awake = True
        seed = bytes.fromhex(message["seed"])
        random.seed(seed)
        modules: dict[str, Any] = sys.modules
        try:
            if "numpy" in modules:
                modules["numpy"].random.seed(list(seed))
            if "ssl" in modules:
                modules["ssl"].RAND_add(seed, len(seed))
        except Exception:  # noqa: S110  # tests may have put something else there
            pass
        os.environ.update(message["environment"])
        self.settings["fixtures"].update(message["fixtures"])
        # Nobody reads it, and what plugins import for it takes longer than a test does. It stays a hook,
        # or pluggy could unregister no plugin any more.
        name, manager = "pytest_terminal_summary", self.config.pluginmanager
        vars(self.config.hook)[name] = manager.subset_hook_caller(name, manager.get_plugins())
        self.wire.say({"awake": len(seed)})

    def run(self, session: pytest.Session, message: dict[str, Any]) -> bool:
        item = self.items[message["id"]]
        item._report_sections.clear()  # noqa: SLF001  # the host may have it twice, and we once
        self.running, self.reported = message["id"], []
        for name, reason in message.get("marks", ()):
            item.add_marker(getattr(self.mark, name)(reason=reason))
        self.reruns = False
        if attempt := message.get("attempt", 0):  # those before were in other guests
            database: Any = session.config.failures_db  # type: ignore[attr-defined]
            database.get_test_failures = lambda _: attempt
        manager, calls = session.config.pluginmanager, Calls(self.wire)
        if message.get("timed"):
            manager.register(calls)
        try:
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=self.next(message))
        except InAnotherGuest:
            pass
        except self.run_failed as error:
            self.tell_failed(error)
            raise
        finally:
            if message.get("timed"):
                manager.unregister(calls)
        for said in benchmarks_of(session.config, self.settings.get("machine", False)):
            self.wire.say(said)
        self.tell_results()
        stop = session.shouldfail or session.shouldstop
        self.wire.say(
            {
                "done": message["id"],
                "stop": str(stop) if stop else None,
                "fail": bool(session.shouldfail),
            }
        )
        return bool(stop)

    def next(self, message: dict[str, Any]) -> pytest.Item | None:
        """The item for whose sake fixtures stay; one that needs the session's only, if unknown."""
        if message["next"] in self.items:
            return self.items[message["next"]]
        return self.pause if message["more"] else None

    def pytest_runtest_logfinish(self) -> None:
        if self.reruns and self.settings["alone"]:
            raise InAnotherGuest

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.serialized(report)
        # Older pytest-rerunfailures tell no teardown of an attempt that is followed by another.
        if data["when"] == "setup" and (self.reruns or "teardown" in self.reported):
            self.reruns, self.reported = False, []
            self.wire.say({"again": True})
        for note in self.put_right(data):
            self.wire.say(note)
        if data["outcome"] not in self.outcomes:
            return
        if self.is_of_phase(data):
            if data["when"] in self.reported:
                return
            self.reported.append(data["when"])
            self.reruns |= data["outcome"] == RERUN
        for name in ("keywords", "location"):  # the host has its own
            data.pop(name, None)
        data["attributes"], notes = attributes_of(report)
        data["scenario"] = scenario_of(report)
        message = bounded({"report": clean(data)})
        if len(message["report"]["user_properties"]) < len(report.user_properties):
            notes.append({"note": "properties", "name": str(len(report.user_properties))})
        for note in notes:
            self.wire.say(note)
        self.wire.say(message)

    def is_of_phase(self, data: dict[str, Any]) -> bool:
        """Whether a report ends a phase of its test; others are one more: subtests', and pytest-retry's."""
        return "_report_type" not in data and data["outcome"] != RETRIED

    def put_right(self, data: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Let a report be one that the host expects; messages about what a hook has made of it."""
        data["user_properties"] = [
            [str(name), portable(value)] for name, value in data["user_properties"][:MAX_PROPERTIES]
        ]
        if data["nodeid"] != self.running:
            yield {"note": "renamed", "name": clean(data["nodeid"])}
            data["nodeid"] = self.running
        if data["outcome"] not in self.outcomes:
            yield {"note": "outcome", "name": clean(str(data["outcome"]))}
        elif self.is_of_phase(data) and data["when"] in self.reported:
            yield {"note": "twice", "name": clean(str(data["when"]))}

    def serialized(self, report: pytest.TestReport | pytest.CollectReport) -> dict[str, Any]:
        """What a report consists of.

        pytest can tell it, too, but uses modules that tests patch, and plain pytest does not do it.
        """
        data: dict[str, Any] = {
            name: value for name, value in vars(report).items() if name in FIELDS
        }
        data["nodeid"] = str(data.pop("_id", None) or data["nodeid"])  # `_id` since pytest 9.2
        data["longrepr"] = self.longrepr(report.longrepr)
        if type(report).__name__.lower() == "subtestreport":  # pytest's, or pytest-subtests'
            context = data.pop("context")
            data["_report_type"] = "SubTestReport"
            data["_subtest.context"] = {"msg": context.msg, "kwargs": context.kwargs}
        return data

    def longrepr(self, value: Any) -> Any:
        """What went wrong, in the shape that pytest gives it when it serializes a report."""
        if not hasattr(value, "toterminal"):
            return value
        if not hasattr(value, "reprtraceback") or not hasattr(value, "reprcrash"):
            return {"text": self.text(value)}
        chain = getattr(value, "chain", None)
        return {
            "reprcrash": fields(value.reprcrash, *PLACE),
            "reprtraceback": trace(value.reprtraceback),
            "sections": value.sections,
            "chain": None
            if chain is None
            else [(trace(of), fields(crash, *PLACE), text) for of, crash, text in chain],
        }

    def text(self, value: Any) -> str:
        """What pytest would show of a representation of its own."""
        self.shown.seek(0)
        self.shown.truncate()
        try:
            value.toterminal(self.screen)
        except Exception as error:
            return "<%s that cannot be shown: %s>" % (type(value).__name__, type(error).__name__)
        return self.shown.getvalue().strip()

    def pytest_warning_recorded(
        self,
        warning_message: warnings.WarningMessage,
        when: str,
        nodeid: str,
        location: tuple[str, int, str] | None,
    ) -> None:
        category = warning_message.category
        try:
            source = linecache.getline(warning_message.filename, warning_message.lineno)
        except Exception:  # Python's own way to show warnings does without it, too
            source = ""
        self.wire.say(
            clean(
                {
                    "warning": str(warning_message.message),
                    "category": [category.__module__, category.__name__],
                    "file": warning_message.filename,
                    "line": warning_message.lineno,
                    "when": when,
                    "node": nodeid,
                    "location": location,
                    "source": source,
                }
            )
        )

    def tell_failed(self, error: BaseException | None) -> None:
        """Tell that something has failed the run as a whole; pytest has a hook for other ends only."""
        if isinstance(error, self.run_failed):
            self.wire.say(clean({"interrupted": str(error), "how": "failed"}))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        how = "key"
        if isinstance(excinfo.value, self.exit):
            how = "left"
        elif isinstance(excinfo.value, self.run_stopped):
            how = "stopped"
        status = getattr(excinfo.value, "returncode", None) if how == "left" else None
        self.wire.say(clean({"interrupted": str(excinfo.value), "how": how, "status": status}))

    def pytest_internalerror(self, excrepr: object) -> None:
        self.wire.say({"internal": clean(self.text(excrepr))})

    def pytest_unconfigure(self) -> None:
        self.tell_results()
        self.wire.say({"finished": True})

    def tell_results(self) -> None:
        """Send the files that allure has written since, and remove them."""
        folder = self.settings.get("allure")
        try:
            names = sorted(os.listdir(folder)) if folder else []
        except FileNotFoundError:  # allure is not here
            return
        for name in names:
            path = "%s/%s" % (folder, name)
            if os.stat(path).st_size > MAX_RESULT:
                self.wire.say({"note": "result", "name": clean(name)})
            else:
                with open(path, "rb") as file:
                    data = binascii.b2a_base64(file.read(), newline=False).decode()
                self.wire.say({"allure": clean(name), "data": data})
            os.unlink(path)


def let_ini_keys_be(config: Any, rows: list[tuple[list[str], Any]]) -> None:
    """Let ini keys have the host's values, as far as this side has such keys.

    Args:
        rows: the names of a key, and its value.
    """
    values: dict[str, Any] = {}
    for names, packed in rows:
        # One object for all names: `addinivalue_line` adds to it.
        values.update(dict.fromkeys(names, unpacked(packed)))
    read = config.getini

    def getini(name: str) -> Any:
        own = read(name)  # or it is unknown here
        return values.get(name, own)

    config.getini = getini


def unpacked(value: Any) -> Any:
    """A value of an option or an ini key; JSON has paths and tuples as objects with one member."""
    if isinstance(value, list):
        return [unpacked(member) for member in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(unpacked(value["tuple"]))
        if "py.path" in value:
            import py  # type: ignore[import-untyped]

            return py.path.local(value["py.path"])
        import pathlib

        return pathlib.Path(value["path"])
    return value


def fixtures_of(values: dict[str, object]) -> types.ModuleType:
    """A plugin: fixtures for the whole session that are values of the host's."""
    import pytest

    def fixture_of(name: str) -> object:
        return pytest.fixture(scope="session", name=name)(lambda: values[name])

    module = types.ModuleType("vmsandbox_fixtures")
    for name in values:
        setattr(module, name, fixture_of(name))
    return module


class JUnit:
    """Stands in for the writer of junit's file, which is the host's: tests tell it things."""

    def __init__(self, family: str, wire: Wire) -> None:
        self.family = family
        self.wire = wire

    def add_global_property(self, name: str, value: object) -> None:
        if not isinstance(name, str):
            raise TypeError(
                "name parameter needs to be a string, but %s given" % type(name).__name__
            )
        self.wire.say(clean({"junit": "property", "name": name, "value": str(value)}))

    def node_reporter(self, report: object) -> JUnit:  # noqa: ARG002  # of the one that runs
        return self

    def add_attribute(self, name: str, value: object) -> None:
        self.wire.say(clean({"junit": "attribute", "name": str(name), "value": str(value)}))


OUTERMOST = ("pytest_cmdline_parse", "pytest_sessionstart", "pytest_collection")
FIRST = (
    "pytest_configure",
    "pytest_load_initial_conftests",
    "pytest_runtestloop",
)
LAST = (
    "pytest_collection_finish",
    "pytest_runtest_logfinish",
    "pytest_runtest_logreport",
    "pytest_unconfigure",
)


PLACE = ("path", "lineno", "message")
OUTCOMES = ("passed", "failed", "skipped")
# The outcomes of what pytest-rerunfailures and pytest-retry try again.
RERUN, RETRIED = "rerun", "retried"
# What pytest's own reports consist of. All else on one is from a plugin or a conftest file.
FIELDS = {
    "_id", "nodeid", "location", "keywords", "outcome", "longrepr", "when", "sections", "duration",
    "user_properties", "start", "stop", "wasxfail", "context", "result",
}  # fmt: skip


def attributes_of(report: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What plugins and conftest files have hung on a report: name → value, as JSON has it.

    Returns:
        Those, and messages about what is lost.
    """
    found: dict[str, Any] = {}
    notes: list[dict[str, Any]] = []
    room = MAX_ATTRIBUTE_BYTES
    for name, value in vars(report).items():
        if name in FIELDS:
            continue
        plain = Plain()
        try:
            if not isinstance(value, JSON) and not hasattr(value, "__fspath__"):
                raise TypeError
            found[name] = plain.of(value)
            room -= len(json.dumps(found[name]))
            if room < 0 or len(found) > MAX_ATTRIBUTES:
                raise OverflowError
        except Exception as error:
            found.pop(name, None)
            why = "size" if isinstance(error, OverflowError) else "kind"
            notes.append({"note": "attribute", "name": clean(str(name)), "why": why})
        else:
            if plain.texts:
                notes.append({"note": "attribute", "name": clean(str(name)), "why": "texts"})
    return found, notes


JSON = (bool, int, float, str, list, tuple, dict, type(None))


class Plain:
    """Makes a value one that JSON has; members that it does not have become texts."""

    def __init__(self) -> None:
        self.values = 0
        self.texts = False  # whether there was such a member

    def of(self, value: Any, depth: int = 0) -> Any:
        self.values += 1
        if self.values > MAX_ATTRIBUTE_VALUES or depth > MAX_ATTRIBUTE_DEPTH:
            raise OverflowError
        if isinstance(value, dict):
            self.texts = self.texts or not all(isinstance(key, str) for key in value)
            return {clean(str(key)): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        elif not isinstance(value, JSON):
            self.texts = self.texts or not hasattr(value, "__fspath__")
            value = str(value)
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise OverflowError
        return clean(value)


def scenario_of(report: Any) -> Any:
    """What pytest-bdd 8 and newer note of a report beside it; older ones hang it on the report."""
    registry = getattr(
        sys.modules.get("pytest_bdd.reporting"), "test_report_context_registry", None
    )
    context = registry.get(report) if registry is not None else None
    return None if context is None else {"scenario": context.scenario, "name": context.name}


def benchmarks_of(config: Any, about_machine: bool) -> Iterator[dict[str, Any]]:
    """Messages with what pytest-benchmark has measured since they were last asked for.

    Args:
        about_machine: whether the host will save them, with what they were measured on.
    """
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    name_of = sys.modules["pytest_benchmark.utils"].funcname
    measured, session.benchmarks[:] = list(session.benchmarks), []
    for one in measured:
        if len(one.stats.data) > MAX_BENCHMARK:
            yield {"note": "rounds", "name": str(len(one.stats.data))}
            continue
        found: dict[str, Any] = {
            name: Plain().of(getattr(one, name))
            for name in ("group", "param", "params", "extra_info", "iterations", "has_error")
        }
        found["data"] = one.stats.data
        found["options"] = {
            name: Plain().of(name_of(value) if callable(value) else value)
            for name, value in one.options.items()
        }
        yield {"benchmark": clean(found), "machine": machine_of(session) if about_machine else None}


def machine_of(session: Any) -> Any:
    """What pytest-benchmark tells of this machine; that takes long, and is found out once."""
    if not hasattr(session, "vmsandbox_machine"):
        session.vmsandbox_machine = Plain().of(session.get_machine_info())
    return session.vmsandbox_machine


def send_logs(config: Any, wire: Wire) -> None:
    """Send the records of tests to the host, where its live log or log file wants them.

    They come by way of pytest's handler for the log file, which no test inside has.
    """
    import logging

    plugin = config.pluginmanager.get_plugin("logging-plugin")
    if plugin is None:
        return
    formatter = logging.Formatter()

    class Records(type(plugin.log_file_handler)):  # type: ignore[misc]
        def setLevel(self, level: object) -> None:  # noqa: N802  # the host looks at levels
            pass

        def emit(self, record: logging.LogRecord) -> None:
            try:
                text = record.getMessage()
                trace = record.exc_info and formatter.formatException(record.exc_info)
            except Exception as error:  # of the test, which pytest lets fail
                text, trace = "%s (%r)" % (record.msg, error), None
            found = {name: getattr(record, name, None) for name in RECORD}
            found.update(msg=text, exc_text=trace or None)
            when = getattr(plugin.log_cli_handler, "_when", None)
            wire.say({"logged": clean(found), "when": clean(when)})
            if self.stream is not None:  # a hook has named a file
                super().emit(record)

    plugin.log_file_handler = Records(os.devnull, delay=True)


RECORD = (
    "name", "levelno", "levelname", "pathname", "lineno", "funcName", "created", "msecs",
    "process", "processName", "thread", "threadName", "taskName", "stack_info",
)  # fmt: skip


def fields(value: Any, *names: str) -> dict[str, Any] | None:
    """Attributes of an object that may be missing."""
    return None if value is None else {name: getattr(value, name) for name in names}


def trace(value: Any) -> dict[str, Any]:
    """A traceback of pytest's."""
    return {
        "reprentries": [entry(each) for each in value.reprentries],
        "extraline": value.extraline,
        "style": value.style,
    }


def entry(value: Any) -> dict[str, Any]:
    """An entry of a traceback of pytest's."""
    data: dict[str, Any] = {"lines": value.lines, "style": value.style}
    if not hasattr(value, "reprfileloc"):
        return {"type": "ReprEntryNative", "data": data}
    data["reprfuncargs"] = fields(value.reprfuncargs, "args")
    data["reprlocals"] = fields(value.reprlocals, "lines")
    data["reprfileloc"] = fields(value.reprfileloc, *PLACE)
    return {"type": "ReprEntry", "data": data}


def portable(value: Any) -> Any:
    """A value that JSON keeps as it is; of another, the text that junit's file has of it."""
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except Exception:  # noqa: S110  # then as text
        pass
    try:
        return str(value)
    except Exception:
        return value


def clean(value: Any, depth: int = 0) -> Any:
    """A value as JSON can carry it: what it cannot becomes its repr, what is long is cut."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 1 << 64:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            gone = len(value) - MAX_TEXT
            half = MAX_TEXT // 2
            value = "%s\n[%d characters left out]\n%s" % (value[:half], gone, value[-half:])
        return str.encode(value, "utf-8", "backslashreplace").decode()
    if depth > 40:
        return "…"
    if isinstance(value, dict):
        return {clean(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(item, depth + 1) for item in value]
    try:
        if hasattr(value, "__fspath__"):
            return clean(os.fspath(value), depth)
        return clean(repr(value), depth)
    except Exception as error:
        return "<%s whose repr() fails: %s>" % (type(value).__name__, type(error).__name__)


def bounded(message: dict[str, Any]) -> dict[str, Any]:
    """A report that fits into one message; its captured output goes first."""
    report = message["report"]
    size = sum(len(text) for _, text in report["sections"]) + len(str(report["longrepr"]))
    if size + len(str(report["user_properties"])) > MAX_MESSAGE // 6:  # as JSON, it may grow
        report["sections"] = [
            [name, text[:100_000] + "\n[the rest was too much to be sent]"]
            for name, text in report["sections"][:20]
        ]
        report["user_properties"] = []
        if size > MAX_MESSAGE // 6 and len(str(report["longrepr"])) > MAX_MESSAGE // 6:
            report["longrepr"] = "(too long to be sent)"
    return message


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        probe()
    else:
        {"serve": serve, "attach": attach}[sys.argv[1]](sys.argv[2])
