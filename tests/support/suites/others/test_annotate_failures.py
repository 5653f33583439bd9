def test_fails():
    raise OSError("told to GitHub")
