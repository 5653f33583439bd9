import signal


def pytest_configure():
    """Let Ctrl-C reach us: a shell starts what ends in `&` deaf to it, and what tests start inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
