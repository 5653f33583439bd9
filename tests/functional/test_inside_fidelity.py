"""A real guest: what pytest tells here of tests that run inside it is what plain pytest tells there."""

from support import fidelity, oracle


def test_every_kind_of_outcome(tmp_path):
    ours, theirs = oracle.compare("debian-13", tmp_path)
    assert len(theirs.cases) > 150
    assert fidelity.differences(ours, theirs) == []
