"""The architecture of the foreign guests in our tests. They are emulated on each machine."""

from __future__ import annotations

from pytest_vmsandbox.core.architecture import native_architecture

FOREIGN = next(name for name in ("aarch64", "x86_64") if name != native_architecture())
