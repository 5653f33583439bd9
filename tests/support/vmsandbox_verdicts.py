"""A plugin that writes down how tests end; as a program, it runs plain pytest with it.

    python vmsandbox_verdicts.py ARGUMENTS -- FILE...

Each file runs in a process of its own; if a test ends it, another one runs the tests that follow.
The variable ``VERDICTS`` names the file to write to. The plugin's name keeps it from being handed on
to the guest's pytest.
"""

import fcntl
import os
import sys

import pytest

COLLECTED, STARTED, ENDED = "collected ", "started ", "ended"


class Recorder:
    """Uses nothing that a test could patch or close, but for what pytest uses, too."""

    def __init__(self, file, skip=0):
        low = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 800)
        os.close(low)
        self.write = os.write
        self.skip = skip

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        self.say(f"{COLLECTED}{len(items)}")
        del items[: self.skip]
        self.names = [item.nodeid for item in items]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self):
        self.say(f"{STARTED}{self.names.pop(0)}")
        result = yield
        self.say(ENDED)
        return result

    def pytest_runtest_logreport(self, report):
        self.say(f"{report.when} {report.outcome}")

    def say(self, line):
        self.write(self.descriptor, f"{line}\n".encode())


def pytest_configure(config):
    config.pluginmanager.register(Recorder(os.environ["VERDICTS"]))


def read(text, image=""):
    """How each test ended: its reports, and `ENDED` unless it ended its process.

    Args:
        image: the name of the guest's, which is in the tests' ids.
    """
    verdicts = {}
    for part in text.split(STARTED)[1:]:
        nodeid, *lines = part.splitlines()
        name = nodeid.replace(f"[{image}]", "").replace(f"[{image}-", "[")
        verdicts[name] = [line for line in lines if not line.startswith(COLLECTED)]
    return verdicts


def run(args, file, skip):
    """Run the tests of a file, but for the first ones; all that was written down so far."""
    record = os.environ["VERDICTS"]
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        leave = os._exit
        try:
            pytest.main([*args, file], plugins=[Recorder(record, skip)])
        finally:
            leave(0)
    os.waitpid(pid, 0)
    with open(record, encoding="utf-8") as lines:
        return lines.read()


def main(args, files):
    for file in files:
        done, total = 0, 1
        while done < total:
            lines = run(args, file, done).splitlines()
            total = int([line for line in lines if line.startswith(COLLECTED)][-1].split()[1])
            before, done = done, sum(line.startswith(f"{STARTED}{file}::") for line in lines)
            assert done > before, f"no test of {file} was run"


if __name__ == "__main__":
    at = sys.argv.index("--")
    main(sys.argv[1:at], sys.argv[at + 1 :])
