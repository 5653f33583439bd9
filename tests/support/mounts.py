"""Small file systems, to be filled."""

import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def small_file_system(folder, size):
    """A file system in memory with so much room, mounted on a new folder; only root may do so."""
    folder.mkdir(mode=0o700)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "vmsandbox-test", folder]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
