"""The helper for guests of another architecture, as this machine makes it."""

import hashlib
from pathlib import Path

from pytest_vmsandbox.catalogue import helpers
from pytest_vmsandbox.core.paths import cache_dir
from support.foreign import FOREIGN


def test_it_is_the_same_wherever_it_is_built(monkeypatch):
    """Byte for byte: SHA256SUMS names what was built elsewhere, in another folder, for the wheel."""
    monkeypatch.setattr(helpers, "_PACKAGED", Path("/nowhere"))
    program = helpers.helper_program(FOREIGN, cache_dir())
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    assert digest == helpers.recorded(helpers.helper_source())[FOREIGN]
