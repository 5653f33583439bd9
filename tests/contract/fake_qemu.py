"""A program that behaves like QEMU as far as `machine.Machine` is concerned.

It takes our command line, speaks QMP on the descriptor it is given, and writes to its console.
Which version it plays is the end of its own name, such as ``qemu-system-fake-11.1.3``.
``-fake FAULT`` (the test adds it) lets it go wrong in one way. Standard library only.
"""

import array
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import sys

RELEASE = sys.argv[0].rpartition("-")[2]
VERSION = dict(zip(("major", "minor", "micro"), map(int, RELEASE.split(".")), strict=True))
MAJOR, MINOR = VERSION["major"], VERSION["minor"]
PNG = b"\x89PNG\r\n\x1a\n and so on"
QCOW2 = b"QFI\xfb"
STATE = b"a state of the fake\n"


def descriptor(options, chardev):
    """The number of the descriptor that a chardev is on."""
    for value in options["-chardev"]:
        parts = dict(part.split("=", 1) for part in value.split(",")[1:])
        if parts["id"] == chardev:
            return int(parts["fd"])
    raise SystemExit(f"no chardev {chardev}")


def parse(argv):
    options = {}
    words = iter(argv)
    for word in words:
        flags = ("-nodefaults", "-no-user-config", "-S")
        options.setdefault(word, []).append("" if word in flags else next(words))
    return options


class Refused(Exception):
    def __init__(self, text, kind="GenericError"):
        super().__init__(text)
        self.kind = kind


class FakeQemu:
    def __init__(self, argv):
        self.options = parse(argv)
        self.fault = self.options.get("-fake", [""])[0]
        self.has_monitor_of_its_time()
        self.monitor = socket.socket(fileno=descriptor(self.options, "qmp"))
        self.console = socket.socket(fileno=descriptor(self.options, "console"))
        self.status = "inmigrate" if "-incoming" in self.options else "running"
        self.capabilities = {}
        self.why = None  # a transfer failed
        self.names = {}  # descriptors that came along and have a name
        self.passed = []  # descriptors that came along
        self.sets = {int(it.split("set=")[1]): [] for it in self.options.get("-add-fd", [])}
        self.forwards = []
        self.queue = []
        self.files = []
        self.covered = []  # those that others are on top of
        self.plugged = {}  # devices in root ports
        self.leaving = []  # of those, which are to go
        self.refused = []  # block devices that were not deleted at once
        for value in self.options["-device"]:
            about = dict(part.split("=", 1) for part in value.split(",")[1:])
            if about.get("bus", "").startswith("port"):
                self.plugged[about["id"]] = about["bus"]
        for value in self.options.get("-blockdev", []):
            node = json.loads(value)
            os.fstat(int(node["file"]["filename"].rpartition("/")[2]))  # it has to be there
            self.files.append(node)
        for value in self.options.get("-object", []):
            for part in value.split(","):
                if part.startswith("mem-path="):
                    how = os.O_RDONLY if "readonly=on" in value else os.O_RDWR
                    os.close(os.open(part.removeprefix("mem-path="), how))

    def has_monitor_of_its_time(self):
        """An old one knows no other way, and a new one warns of the old way."""
        is_object = any(it.startswith("monitor-qmp,") for it in self.options.get("-object", []))
        if is_object and (MAJOR, MINOR) < (11, 1):
            raise SystemExit("fake: -object: invalid object type: monitor-qmp")
        if not is_object and "-mon" not in self.options:
            raise SystemExit("fake: there is no monitor")
        if not is_object and (MAJOR, MINOR) >= (11, 1):
            print("fake: warning: '-mon' is deprecated", file=sys.stderr, flush=True)

    # -- commands -------------------------------------------------------------------------------

    def do_qmp_capabilities(self, enable=()):
        return {}

    def do_query_status(self):
        if self.status == "finish-migrate":
            self.finishing -= 1
            if self.finishing < 0:
                self.status = "postmigrate"
        return {"status": self.status, "running": self.status == "running"}

    def do_query_version(self):
        return {"qemu": VERSION, "package": "fake"}

    def do_query_named_block_nodes(self, flat=False):
        return [{"node-name": node["node-name"], "drv": node["driver"]} for node in self.files]

    def do_stop(self):
        self.status = "paused"
        self.event("STOP")
        return {}

    def do_cont(self):
        if self.status == "finish-migrate":
            raise Refused("Migration is not finalized yet")
        self.status = "running"
        self.event("RESUME")
        return {}

    def do_getfd(self, fdname):
        if not self.passed:
            raise Refused("No file descriptor supplied via SCM_RIGHTS")
        self.names[fdname] = self.passed.pop()
        return {}

    def do_migrate_set_capabilities(self, capabilities):
        self.capabilities |= {it["capability"]: it["state"] for it in capabilities}
        return {}

    def do_migrate_set_parameters(self, max_bandwidth):
        return {}

    def do_query_migrate(self):
        return {"status": "failed", "error-desc": self.why} if self.why else {}

    def do_migrate(self, uri):
        if self.status == "inmigrate":
            raise Refused("Guest is waiting for an incoming migration")
        with self.opened(uri, os.O_WRONLY) as file:
            try:
                file.write(STATE + json.dumps(self.fits()).encode())
            except OSError as error:
                self.why = f"Unable to write to socket: {error.strerror}"
                self.transferred("failed")
                self.finish()
                return {}
        if self.fault == "never-saves":
            return {}
        self.transferred("completed")
        self.finish()
        return {}

    def finish(self):
        """Take no orders until the status was asked for a few times."""
        self.status, self.finishing = "finish-migrate", 3

    def do_migrate_incoming(self, uri):
        if self.status != "inmigrate":
            raise Refused("'-incoming' was not specified on the command line")
        with self.opened(uri, os.O_RDONLY) as file:
            state = file.read()
        if state != STATE + json.dumps(self.fits()).encode():
            print("fake: load of migration failed: Invalid argument", file=sys.stderr, flush=True)
            self.transferred("failed")
            self.queue.append(None)
            return {}
        self.transferred("completed")
        self.status = "paused" if "-S" in self.options else "running"
        return {}

    def opened(self, uri, access):
        """The open file that a state goes to, or comes from."""
        kind, _, name = uri.partition(":")
        if kind == "fd":
            fd = self.names.pop(name)
            if stat.S_ISREG(os.fstat(fd).st_mode) and MAJOR >= 11:
                os.close(fd)
                raise Refused("fd: migration to a file is not supported. Use file: instead.")
        elif kind == "file" and (MAJOR, MINOR) >= (8, 2):
            fd = os.dup(self.of_set(name, access))
            if access == os.O_WRONLY:
                os.truncate(fd, 0)
        else:
            raise Refused(f"unknown migration protocol: {uri}")
        return os.fdopen(fd, "wb" if access == os.O_WRONLY else "rb", buffering=0)

    def of_set(self, filename, access):
        """The descriptor of a set that is open in just this way."""
        for fd in self.sets[int(filename.removeprefix("/dev/fdset/"))]:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == access:
                return fd
        raise Refused(f"Failed to open file '{filename}': Permission denied")

    def fits(self):
        """What a state has in common with the machine that it is loaded into."""
        devices = [it.split(",")[0] for it in self.options["-device"] if ",bus=port" not in it]
        devices += sorted(self.plugged.items())
        return [self.options["-m"], devices, self.capabilities.get("x-ignore-shared", False)]

    def transferred(self, status):
        if self.capabilities.get("events"):
            self.event("MIGRATION", status="active")
            self.event("MIGRATION", status=status)

    def do_blockdev_add(self, node_name, driver, file, **more):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,30}", node_name):
            raise Refused(f"Invalid node-name: '{node_name}'")
        number = int(file["filename"].removeprefix("/dev/fdset/"))
        if driver == "qcow2" and os.pread(self.sets[number][0], 4, 0) != QCOW2:
            raise Refused("Image is not in qcow2 format")
        self.files.append({"node-name": node_name, "driver": driver})
        return {}

    def do_blockdev_del(self, node_name):
        """Refuse it once: a device lets go of it a moment after it has told that it is gone."""
        if node_name not in self.refused:
            self.refused.append(node_name)
            raise Refused(f"Node {node_name} is in use")
        self.files = [it for it in self.files if it["node-name"] != node_name]
        self.covered = [it for it in self.covered if it != node_name]
        return {}

    def do_device_add(self, id, bus, drive, **more):  # noqa: A002  # QMP's name
        taken = [it for it in self.plugged.values() if it == bus]
        if taken or not any(f"id={bus}," in it for it in self.options["-device"]):
            raise Refused(f"Bus '{bus}' does not support hotplugging")
        if drive not in [it["node-name"] for it in self.files]:
            raise Refused(f"Property 'virtio-blk-device.drive' can't find value '{drive}'")
        self.plugged[id] = bus
        return {}

    def do_device_del(self, id):  # noqa: A002  # QMP's name
        """Wait for a reset, as long as no guest answers."""
        if id not in self.plugged:
            raise Refused(f"Device '{id}' not found", "DeviceNotFound")
        if id in self.leaving:
            raise Refused(f"Device {id} is already in the process of unplug")
        self.leaving.append(id)
        return {}

    def do_blockdev_snapshot(self, node, overlay):
        names = [it["node-name"] for it in self.files]
        if not {node, overlay} <= set(names) or node in self.covered:
            raise Refused(f"Cannot put {overlay} on top of {node}")
        self.covered.append(node)
        return {}

    def do_system_powerdown(self):
        if self.fault == "powers-off":
            self.event("SHUTDOWN", guest=True, reason="guest-shutdown")
            self.queue.append(None)
        return {}

    def do_system_reset(self):
        for device in self.leaving:
            del self.plugged[device]
            self.event("DEVICE_DELETED", device=device, path=f"/machine/peripheral/{device}")
        self.leaving.clear()
        self.event("RESET", guest=False, reason="host-qmp-system-reset")
        return {}

    def do_quit(self):
        if self.fault in {"stubborn", "very-stubborn"}:
            return {}
        self.event("SHUTDOWN", guest=False, reason="host-qmp-quit")
        self.queue.append(None)
        return {}

    def do_human_monitor_command(self, command_line):
        words = command_line.split()
        if words == ["info", "usernet"]:
            lines = ["Hub -1 (n0):", "  Protocol[State]    FD  Source Address  Port   Dest."]
            for number, (protocol, sock, port) in enumerate(self.forwards):
                host, here = sock.getsockname()
                lines.append(
                    f"  {protocol.upper()}[HOST_FORWARD]  {number:3}  {host:>14} {here:5}  "
                    f"     10.0.2.15 {port:5}     0     0"
                )
            return "\r\n".join(lines) + "\r\n"
        if words[0] == "hostfwd_add":
            protocol, host, rest = words[2].split(":", 2)
            here, there = rest.split("-:")
            if not 0 < int(there) < 65536:
                return f"invalid host forwarding rule '{words[2]}'\r\n"
            kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
            sock = socket.socket(type=kind)
            sock.bind((host, int(here)))
            if protocol == "tcp":
                sock.listen()
            self.forwards.append((protocol, sock, int(there)))
            return ""
        return f"unknown command: '{words[0]}'\r\n"

    def do_add_fd(self):
        if not self.passed:
            raise Refused("No file descriptor supplied via SCM_RIGHTS")
        number = max(self.sets, default=0) + 1
        self.sets[number] = [self.passed.pop()]
        return {"fdset-id": number, "fd": self.sets[number][0]}

    def do_remove_fd(self, fdset_id):
        if fdset_id not in self.sets:
            raise Refused(f"File descriptor named 'fdset-id:{fdset_id}' not found")
        for fd in self.sets.pop(fdset_id):
            os.close(fd)
        return {}

    def do_query_fdsets(self):
        return [{"fdset-id": number, "fds": []} for number in self.sets]

    def do_screendump(self, filename, format="ppm"):  # noqa: A002  # QMP's name
        number = int(filename.removeprefix("/dev/fdset/"))
        os.write(self.sets[number][0], PNG)
        return {}

    # -- the protocol ---------------------------------------------------------------------------

    def event(self, name, **data):
        now = {"seconds": 1, "microseconds": 0}
        message = {"event": name, "timestamp": now}
        if data:
            message["data"] = data
        self.queue.append(message)

    def send(self, message):
        self.monitor.sendall(json.dumps(message).encode() + b"\r\n")

    def flush(self):
        for message in self.queue:
            if message is None:
                sys.exit(0)
            self.send(message)
        self.queue.clear()

    def obey(self, request):
        name = request["execute"]
        if self.fault == "dies-in-the-middle" and name == "query-version":
            print("fake: assertion failed: version >= 0", file=sys.stderr, flush=True)
            os.abort()
        if self.fault == "stops-and-falls-silent" and name == "query-status":
            self.monitor.shutdown(socket.SHUT_RDWR)
            signal.pause()
        if self.fault == "hangs" and name == "query-version":
            return
        method = getattr(self, "do_" + name.replace("-", "_"), None)
        arguments = {k.replace("-", "_"): v for k, v in request.get("arguments", {}).items()}
        try:
            if method is None:
                raise Refused(f"The command {name} has not been found", "CommandNotFound")
            answer = {"return": method(**arguments)}
        except Refused as error:
            answer = {"error": {"class": error.kind, "desc": str(error)}}
        except TypeError as error:
            answer = {"error": {"class": "GenericError", "desc": str(error)}}
        if "id" in request:
            answer["id"] = request["id"]
        self.send(answer)
        if name == "qmp_capabilities":
            self.after_greeting()
        self.flush()

    def after_greeting(self):
        if self.fault == "panic":
            self.console.sendall(
                b"vmsandbox: init\r\n[    1.5] Kernel panic - not syncing: "
                b"Attempted to kill init! exitcode=0x00000100\r\n[    1.6] Call Trace:\r\n"
            )
            self.status = "guest-panicked"
            self.event("GUEST_PANICKED", action="pause")
        elif self.fault in {"internal-error", "io-error"}:
            self.status = self.fault
            self.event("STOP")
        elif self.fault in {"disk-full", "over-quota", "disk-damaged", "disk-fails-on-purpose"}:
            node = "f" if self.fault == "disk-fails-on-purpose" else self.files[-1]["node-name"]
            number = {"disk-full": errno.ENOSPC, "over-quota": errno.EDQUOT}.get(
                self.fault, errno.EIO
            )
            # With werror=report, QEMU does not say whether there was no room.
            about = {"operation": "write", "action": "report", "reason": os.strerror(number)}
            self.event("BLOCK_IO_ERROR", device="", **{"node-name": node}, **about)
        elif self.fault == "stops-and-falls-silent":
            self.event("STOP")
        elif self.fault == "greets-and-ends":
            print("fake: changed its mind", file=sys.stderr, flush=True)
            os._exit(3)
        elif self.fault == "boots":
            self.console.sendall(b"[    0.0] Linux version 6\r\nvmsandbox: init\r\n")
        elif self.fault == "prints-panic":
            self.console.sendall(b"Kernel panic - not syncing: says a test\r\n")
            self.console.sendall(b"---[ end Kernel panic - not syncing: says a test ]---\r\n")

    def run(self):
        self.console.sendall(b"SeaBIOS (fake)\r\n")
        if self.fault == "exits":
            print("fake: -machine: unsupported machine type", file=sys.stderr)
            sys.exit(1)
        if self.fault == "silent":
            signal.pause()
        if self.fault == "garbage":
            self.monitor.sendall(b"SSH-2.0-what\r\n" * 3)
            signal.pause()
        if self.fault == "very-stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.send({"QMP": {"version": {"qemu": VERSION, "package": ""}, "capabilities": ["oob"]}})
        if self.fault == "garbage-later":
            self.monitor.recv(1)
            self.monitor.sendall(b"}{ what\r\n")
            signal.pause()
        buffer = b""
        while True:
            select.select([self.monitor], [], [])
            data, ancillary, _, _ = self.monitor.recvmsg(65536, socket.CMSG_SPACE(64))
            for _, kind, content in ancillary:
                if kind == socket.SCM_RIGHTS:
                    numbers = array.array("i")
                    numbers.frombytes(content)
                    self.passed += numbers
            if not data:
                sys.exit(0)
            buffer += data
            # Requests come one to a line, or without any end of line at all.
            while buffer.strip():
                try:
                    request, end = json.JSONDecoder().raw_decode(buffer.decode().lstrip())
                except ValueError:
                    break
                buffer = buffer.decode().lstrip()[end:].encode()
                self.obey(request)


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print("QEMU emulator version {major}.{minor}.{micro} (fake)".format(**VERSION))
    else:
        FakeQemu(sys.argv[1:]).run()
