"""Runs of pytest with tests inside guests that are no guests; see `vmsandbox_local`."""

import shutil
import subprocess
import sys
from pathlib import Path

from support.environment import WITHOUT_HYPOTHESIS, without_ours

SUPPORT = Path(__file__).parent


class Suite:
    """A folder with tests, and runs of pytest on it: this machine plays their guests."""

    def __init__(self, folder):
        self.folder = folder
        self.path = folder / "suite"
        self.path.mkdir()
        (self.path / "pytest.ini").write_text("[pytest]\n")
        # The hook is the host's; a guest's pytest does not know it, so it is told by a plugin.
        (folder / "host_plugin.py").write_text(
            "def pytest_vmsandbox_guest_ready(config, guest):\n"
            f"    with open({str(folder / 'guests')!r}, 'a') as file:\n"
            "        print(guest.name, file=file)\n"
        )

    def write(self, name, source):
        (self.path / name).write_text(source)

    @property
    def guests(self):
        file = self.folder / "guests"
        return file.read_text().split() if file.exists() else []

    def start(self, *args, without=WITHOUT_HYPOTHESIS):
        return subprocess.Popen(
            # Whatever started us in the background may have made us deaf to SIGINT.
            ["env", "--default-signal=INT",
             *(sys.executable, "-m", "pytest", *without, "-p", "no:cacheprovider", "-ra"),
             *("-p", "vmsandbox_local", "-p", "vmsandbox_host_plugin", *args)],
            cwd=self.path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**without_ours(), "PYTHONPATH": f"{SUPPORT.parent}:{SUPPORT}:{self.folder}",
                 "TMPDIR": str(self.folder), "VMSANDBOX_CACHE": str(self.folder / "c"),
                 "VMSANDBOX_RUNTIME": str(self.folder / "r")},
        )  # fmt: skip

    def run(self, *args, timeout=300, **how):
        shutil.copyfile(self.folder / "host_plugin.py", self.folder / "vmsandbox_host_plugin.py")
        with self.start(*args, **how) as process:
            output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
