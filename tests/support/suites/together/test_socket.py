import socket

import pytest
from pytest_socket import SocketBlockedError


@pytest.mark.disable_socket
def test_is_blocked():
    with pytest.raises(SocketBlockedError):
        socket.socket()


@pytest.mark.disable_socket
def test_fails():
    socket.socket()


def test_is_open():
    socket.socket().close()
