def test_passes(record_property):
    record_property("a", 1)
    print("to be logged")


def test_fails():
    raise OSError("in the log")
