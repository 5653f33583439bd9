"""The half of run.py that runs in the emulated host. It needs the standard library only.

The folder that it shares with the real host has `order.json` (the steps), what is to be unpacked,
and takes the results: of each step a log, and a file that is there when the step has ended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

SHARE = Path("/mnt/share")
RESULTS = SHARE / "results"
CHECKOUT, INSTALLED = Path("/opt/checkout"), Path("/opt/installed")
CACHE = Path("/root/.cache/vmsandbox")
PYTEST = ["python3", "-P", "-m", "pytest", "-v", "-rP", "--durations=9", "-p", "no:cacheprovider"]
UNPACKED = {"checkout": CHECKOUT, "installed": INSTALLED, "images": CACHE / "images"}


def main() -> None:
    """Unpack what came along, and run each step."""
    print(f"nested: /dev/kvm is {'there' if Path('/dev/kvm').exists() else 'MISSING'}", flush=True)
    CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, target in UNPACKED.items():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True, mode=0o700)
        subprocess.run(["tar", "-xSf", SHARE / f"{name}.tar", "-C", target], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(INSTALLED),
        "UV_FIND_LINKS": "/opt/wheels",
        "UV_OFFLINE": "1",
    }
    for name, arguments in json.loads((SHARE / "order.json").read_text()).items():
        print(f"nested: {name}: begins", flush=True)
        started = time.monotonic()
        with (RESULTS / f"{name}.log").open("wb", buffering=0) as log:
            status = subprocess.run(
                [*PYTEST, *arguments],
                cwd=CHECKOUT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        seconds = round(time.monotonic() - started)
        os.sync()
        part = RESULTS / f"{name}.part"
        part.write_text(json.dumps({"status": status, "seconds": seconds}))
        part.replace(RESULTS / f"{name}.json")
        print(f"nested: {name}: status {status} after {seconds} s", flush=True)


if __name__ == "__main__":
    main()
