"""Prints facts about a guest's Python. The guest gets this program by standard input, before all else."""

import json
import platform
import sys

print(
    json.dumps(
        {
            "version": list(sys.version_info[:3]),
            "machine": platform.machine(),
            "bits": 64 if sys.maxsize > 2**32 else 32,
            "libc": list(platform.libc_ver()),
            "executable": sys.executable,
        }
    )
)
