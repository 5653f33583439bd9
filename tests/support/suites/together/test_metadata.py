def test_metadata(metadata):
    assert metadata["given"] == "there"
    assert metadata["added"] == "by a hook"


def test_session(record_testsuite_property):
    record_testsuite_property("of the suite", 3)
