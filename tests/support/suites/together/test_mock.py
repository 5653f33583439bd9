import os


def test_passes(mocker):
    patched = mocker.patch("os.getcwd", return_value="/mocked")
    assert os.getcwd() == "/mocked"
    patched.assert_called_once_with()


def test_fails(mocker):
    stub = mocker.stub(name="called")
    stub("a", 1)
    stub.assert_called_once_with("a", 2)
