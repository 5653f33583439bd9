"""Looks at one state of a disk after another. It runs in the guest, with the guest's Python, 3.7 or later.

The first line that it reads is a JSON object: what to mount, and the check's source. Each further line is
the list of what was acknowledged. For each, it mounts the disk, calls the check in a child, and unmounts
the disk. It answers with a line (a word and a number of bytes), and with so many bytes of text.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import errno
import fcntl
import importlib
import json
import linecache
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback

TYPE_CHECKING = False  # known to type checkers; importing typing takes long in a guest
if TYPE_CHECKING:
    from typing import Any, NoReturn

LIMIT = 16384  # bytes of text for one state
TAIL = 2048  # bytes of them for what the check has printed
FLUSH_BUFFERS = 0x1261  # BLKFLSBUF
FORGET_DEVICES = 0x50009405  # BTRFS_IOC_FORGET_DEV
BUSY_SECONDS = 5.0
FLAGS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "sync": 16,
    "dirsync": 128,
    "nosymfollow": 256,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
    "lazytime": 1 << 25,
    "rw": 0,
}

try:
    import ctypes

    LIBC: Any = ctypes.CDLL(None, use_errno=True)
except (ImportError, OSError):  # a Python without libffi: programs do it, more slowly
    LIBC = None


def mount(source: str, folder: str, kind: str, options: list[str]) -> None:
    if LIBC is None:
        argv = ["mount", "-t", kind, "-o", ",".join(options) or "rw", source, folder]
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise OSError(errno.EIO, done.stdout.decode(errors="replace").strip())
        return
    flags = 0
    for option in options:
        flags |= FLAGS.get(option, 0)
    data = ",".join(option for option in options if option not in FLAGS)
    words = [os.fsencode(word) for word in (source, folder, kind, data)]
    if LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def unmount(folder: str) -> None:
    if LIBC is None:
        if subprocess.call(["umount", folder], stderr=subprocess.DEVNULL):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    elif LIBC.umount2(os.fsencode(folder), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def drop_buffers(plan: dict[str, Any]) -> None:
    """Forget what this kernel knows of the disk's content."""
    for device in plan["devices"]:
        number = os.open(device, os.O_RDONLY)
        try:
            fcntl.ioctl(number, FLUSH_BUFFERS, 0)
        finally:
            os.close(number)
    if any(kind == "btrfs" for _, _, kind, _ in plan["mounts"]):
        number = os.open("/dev/btrfs-control", os.O_RDWR)
        try:
            fcntl.ioctl(number, FORGET_DEVICES, bytearray(4096))  # of bytes, Python takes 1024
        except OSError:  # an old kernel, or there are none
            pass
        finally:
            os.close(number)


class Check:
    """The user's function."""

    def __init__(self, plan: dict[str, Any]) -> None:
        name, first, lines = plan["file"], plan["line"], plan["source"].splitlines(True)
        tree = ast.parse(plan["source"], name)
        for node in ast.walk(tree):  # once here, and not once for each state
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.load(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                self.load(node.module)
        ast.increment_lineno(tree, first - 1)
        text = ["\n"] * (first - 1) + lines
        linecache.cache[name] = (sum(map(len, text)), None, text, name)
        names: dict[str, Any] = {"__name__": "check"}
        exec(compile(tree, name, "exec", __future__.annotations.compiler_flag), names)
        self.call, self.file = names[plan["name"]], name

    @staticmethod
    def load(name: str) -> None:
        with contextlib.suppress(Exception):  # the check will say so
            importlib.import_module(name)

    def reason(self, error: BaseException) -> str:
        """The kind of an error in the first line, then where it was raised."""
        frames = traceback.extract_tb(error.__traceback__)
        while frames and frames[0].filename != self.file:
            del frames[0]
        lines = traceback.format_exception_only(type(error), error)
        first = lines[-1].strip() if isinstance(error, SyntaxError) else "".join(lines).strip()
        own = [frame for frame in frames if frame.filename == self.file]
        if not str(error) and own:  # as of an assert without a message
            first = "%s: %s" % (type(error).__name__, own[-1].line)
        return "%s\n%s" % (first, "".join(traceback.format_list(frames)))


class Resident:
    """Looks at states."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.check = Check(plan)
        self.output, name = tempfile.mkstemp()  # for what the check prints
        os.unlink(name)

    def look(self, acknowledged: list[Any]) -> tuple[str, str]:
        """The verdict on the state that the disk has now, and a text."""
        drop_buffers(self.plan)
        mounted = []
        try:
            for source, folder, kind, options in self.plan["mounts"]:
                mount(source, folder, kind, options)
                mounted.append(folder)
        except OSError as error:
            found = "unmountable", "mount: %s" % error.strerror
        else:
            found = self.judged(acknowledged)
        for folder in reversed(mounted):
            if not self.unmounted(folder):
                return "busy", found[1]
        if not self.freed():
            return "busy", found[1]
        return found

    def freed(self) -> bool:
        """Let nothing have the disk any more. Returns whether that worked."""
        end = time.monotonic() + BUSY_SECONDS
        for device in self.plan["devices"]:
            while True:
                try:
                    os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
                    break
                except OSError as error:
                    if error.errno != errno.EBUSY or time.monotonic() > end:
                        return False
                self.shell('leave "$@"; expel "$@"', *self.plan["devices"])
                time.sleep(0.02)
        return True

    def shell(self, command: str, *words: str) -> None:
        subprocess.call(["/bin/sh", "-c", self.plan["functions"] + command, "sh", *words])

    def unmounted(self, folder: str) -> bool:
        """Unmount a folder, although programs use it. Returns whether that worked."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                unmount(folder)
            except OSError:
                if time.monotonic() > end:
                    return False
            else:
                return True
            self.shell('leave "$@"', folder)
            time.sleep(0.02)

    def judged(self, acknowledged: list[Any]) -> tuple[str, str]:
        """Call the check in a child, because it may leave files open, or end Python."""
        os.ftruncate(self.output, 0)
        os.lseek(self.output, 0, os.SEEK_SET)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            self.run(writing, acknowledged)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        try:
            os.killpg(child, signal.SIGKILL)
        except OSError:
            pass
        os.set_blocking(reading, False)  # what the check has left running may hold the other end
        try:
            text = os.read(reading, LIMIT)
        except OSError:
            text = b""
        os.close(reading)
        if os.WIFSIGNALED(status):
            text = b"the check was ended by signal %d\n" % os.WTERMSIG(status)
        elif os.WEXITSTATUS(status) == 0:
            return ("refused", text.decode(errors="replace")) if text else ("ok", "")
        elif not text:
            text = b"the check ended its Python with status %d\n" % os.WEXITSTATUS(status)
        return "broken", (text + self.printed()).decode(errors="replace")

    def run(self, writing: int, acknowledged: list[Any]) -> NoReturn:
        """The child: call the check, and end."""
        status = 70
        try:
            os.setsid()
            os.dup2(self.output, 1)
            os.dup2(self.output, 2)
            try:
                said = self.check.call(pathlib.Path(self.plan["folder"]), acknowledged)
                status = 0
                if said is not None:  # as of a check that forgets to assert
                    text = ascii(said)[:100].encode()
                    os.write(writing, b"it returned %s, and not None: use assert" % text)
            except BaseException as error:
                status = 1
                text = self.check.reason(error).encode(errors="backslashreplace")
                os.write(writing, text[: LIMIT - TAIL])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def printed(self) -> bytes:
        size = os.fstat(self.output).st_size
        text = os.pread(self.output, TAIL, max(0, size - TAIL))
        return b"It printed:\n" + text if text else b""


def main() -> None:
    calls, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)

    def answer(word: str, text: str) -> None:
        data = text.encode(errors="replace")[:LIMIT]
        data = b"%s %d\n%s" % (word.encode(), len(data), data)
        while data:
            data = data[os.write(answers, data) :]

    try:
        resident = Resident(json.loads(calls.readline().decode()))
    except BaseException as error:
        answer("refused", "".join(traceback.format_exception_only(type(error), error)))
        return
    answer("ready", "")
    for line in calls:
        try:
            found = resident.look(json.loads(line.decode()))
        except Exception:
            found = "refused", traceback.format_exc()
        answer(*found)


if __name__ == "__main__":
    main()
