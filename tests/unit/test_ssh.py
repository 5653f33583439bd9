"""Programs over SSH, on a server of our own that really runs them here."""

import errno
import io
import os
import signal
import socket
import struct
import subprocess
import threading
from contextlib import contextmanager

import paramiko
import pytest
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from pytest_vmsandbox.core.errors import CommandError, CommandTimeout, ConfigError, GuestLost
from pytest_vmsandbox.guests.images import adopting
from pytest_vmsandbox.guests.reaching import process as remote, ssh
from pytest_vmsandbox.guests.reaching.access import KeyPair, greeting, refusal
from pytest_vmsandbox.guests.reaching.commands import Command
from pytest_vmsandbox.guests.reaching.ssh import FirstTransport, SSHTransport, host_key_at
from support.arguments import FITS, TOO_LONG, output_of

GONE = (OSError, EOFError, paramiko.SSHException)  # what a server hears when its client has gone
OURS, THEIRS, OTHER = KeyPair.generate(), KeyPair.generate(), KeyPair.generate()

# The public halves of Vagrant's keys, as the boxes have them.
VAGRANT_ED25519 = "AAAAC3NzaC1lZDI1NTE5AAAAIN1YdxBpNlzxDqfJyw/QKow1F+wvG9hXGoqiysfJOn5Y"
VAGRANT_RSA = "AAAAB3NzaC1yc2EAAAABIwAAAQEA6NF8iallvQVp22WDkTkyrtvp9eWW6A8YVr+kz4TjGYe7gHzI"


def private(pair):
    return paramiko.Ed25519Key.from_private_key(io.StringIO(pair.private))


class Server(paramiko.ServerInterface):
    """One connection: each command becomes a process here."""

    def __init__(self, host):
        self.host = host

    def get_allowed_auths(self, username):
        return "publickey,password"

    def check_auth_publickey(self, username, key):
        offered = f"{key.get_name()} {key.get_base64()}"
        self.host.offered.append(key.get_name())
        known = offered in self.host.authorized and username != "stranger"
        return AUTH_SUCCESSFUL if known else AUTH_FAILED

    def check_auth_password(self, username, password):
        known = (username, password) == ("pi", "raspberry")
        return AUTH_SUCCESSFUL if known else AUTH_FAILED

    def check_channel_request(self, kind, chanid):
        return OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel, command):
        self.host.begin(self.work, channel, command)
        return True

    def work(self, channel, command):
        if self.host.noise:
            channel.sendall(self.host.noise)
        process = subprocess.Popen(
            [*self.host.shell, "-c", command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.host.processes.append(process)
        pumps = [
            threading.Thread(target=self.pump, args=(process.stdout, channel.sendall)),
            threading.Thread(target=self.pump, args=(process.stderr, channel.sendall_stderr)),
        ]
        feeder = threading.Thread(target=self.feed, args=(channel, process.stdin))
        for thread in (*pumps, feeder):
            thread.start()
        for thread in pumps:
            thread.join()
        status = process.wait()
        try:
            if status < 0:
                message = paramiko.Message()
                message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
                message.add_int(channel.remote_chanid)
                message.add_string("exit-signal")
                message.add_boolean(False)
                message.add_string(signal.Signals(-status).name.removeprefix("SIG"))
                message.add_boolean(False)
                message.add_string("")
                message.add_string("")
                channel.transport._send_user_message(message)
            else:
                channel.send_exit_status(status)
            channel.close()
        except GONE:
            pass
        finally:
            feeder.join()

    @staticmethod
    def pump(source, send):
        with source:
            while data := source.read1(32_768):
                try:
                    send(data)
                except GONE:
                    break

    @staticmethod
    def feed(channel, sink):
        try:
            with sink:
                while data := channel.recv(32_768):
                    sink.write(data)
                    sink.flush()
        except OSError:
            pass


class Host:
    """A machine with an SSH server, on loopback."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.noise = b""
        self.shell = ["/bin/sh"]
        self.authorized = [OURS.public]
        self.offered = []  # kinds of keys
        self.sessions = []
        self.processes = []
        self.threads = []
        self.begin(self.serve)

    def begin(self, work, *args):
        thread = threading.Thread(target=work, args=args)
        self.threads.append(thread)
        thread.start()

    def serve(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            session = paramiko.Transport(sock)
            session.set_log_channel(ssh._LOG)
            session.add_server_key(private(THEIRS))
            self.sessions.append(session)
            try:
                session.start_server(server=Server(self))
            except GONE:
                session.close()

    def hang_up(self):
        for session in self.sessions:
            session.close()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        self.hang_up()
        for thread in self.threads:
            thread.join()
        for session in self.sessions:
            session.join(5)


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


@pytest.fixture
def nobody():
    """An address where nobody listens, nor will."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()


@contextmanager
def transport_to(address, *, key=OURS, host_key=THEIRS, user="root", check=lambda: None, timeout=5):
    transport = SSHTransport(
        address=lambda: address,
        user=user,
        key=key,
        host_key=host_key.public,
        check=check,
        connect_timeout=timeout,
        quiet_seconds=0.5,
    )
    try:
        yield transport
    finally:
        transport.close()


@pytest.fixture
def transport(host):
    with transport_to(host.address) as transport:
        yield transport


def sh(script, **more):
    return Command(argv=("/bin/sh", "-c", script), **more)


def run(transport, command, *, stdin=None, timeout=10):
    out, err = bytearray(), bytearray()
    process = transport.start(command)
    try:
        stream = None if stdin is None else io.BytesIO(stdin)
        status = process.communicate(stream, out.extend, err.extend, timeout)
    finally:
        process.close()
    return status, bytes(out), bytes(err)


class TestKeyPair:
    def test_each_is_another_one(self):
        assert len({OURS.private, THEIRS.private, OTHER.private}) == 3
        assert OURS.public.startswith("ssh-ed25519 AAAA")

    def test_the_parts_belong_together(self):
        assert OURS.public == f"ssh-ed25519 {private(OURS).get_base64()}"

    def test_is_saved_for_this_user_alone(self, tmp_path):
        OURS.save(tmp_path / "key")
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "key").read_text() == OURS.private


class TestGreeting:
    def test_of_a_server(self, host):
        assert greeting(host.address, 5)

    def test_of_nobody(self, nobody):
        assert not greeting(nobody, 5)

    def test_of_one_who_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert not greeting(listener.getsockname(), 0.05)


class TestRefusal:
    """What QEMU's forwarding shows of a guest: it takes each connection before it asks the guest."""

    @pytest.fixture
    def forwarding(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield listener

    @pytest.mark.parametrize("linger", [b"", struct.pack("ii", 1, 0)], ids=["end", "reset"])
    def test_by_the_guest(self, forwarding, linger):
        def refuse():
            connection, _ = forwarding.accept()
            with connection:
                if linger:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

        thread = threading.Thread(target=refuse)
        thread.start()
        assert refusal(forwarding.getsockname(), 5)
        thread.join()

    def test_a_guest_that_is_not_reached_does_not_answer(self, forwarding):
        assert not refusal(forwarding.getsockname(), 0.05)

    def test_a_guest_that_takes_the_connection(self, host):
        assert not refusal(host.address, 5)

    def test_where_nothing_is_forwarded(self, nobody):
        assert not refusal(nobody, 5)


class TestConnection:
    def test_is_made_once(self, host, transport):
        assert [run(transport, sh("exit 0"))[0] for _ in range(3)] == [0, 0, 0]
        assert len(host.sessions) == 1

    def test_is_made_anew_after_it_was_closed(self, host, transport):
        run(transport, sh("exit 0"))
        transport.close()
        assert run(transport, sh("exit 3"))[0] == 3
        assert len(host.sessions) == 2

    def test_is_made_anew_after_it_broke(self, host, transport):
        run(transport, sh("exit 0"))
        host.hang_up()
        assert run(transport, sh("exit 3"))[0] == 3

    def test_another_host_key_is_refused(self, host):
        with (
            transport_to(host.address, host_key=OTHER) as transport,
            pytest.raises(GuestLost, match="another host key than the image") as caught,
        ):
            transport.start(sh("exit 0"))
        assert caught.value.stage == "ssh"
        assert host.processes == []

    @pytest.mark.parametrize("wrong", [{"key": OTHER}, {"user": "stranger"}])
    def test_who_is_not_known_is_refused(self, host, wrong):
        with (
            transport_to(host.address, **wrong) as transport,
            pytest.raises(ConfigError, match="cannot log in to the guest"),
        ):
            transport.start(sh("exit 0"))

    def test_nobody_listens(self, nobody):
        with (
            transport_to(nobody) as transport,
            pytest.raises(GuestLost, match=r"the SSH connection failed: .*refused"),
        ):
            transport.start(sh("exit 0"))

    def test_a_server_that_never_greets(self):
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            transport_to(listener.getsockname(), timeout=0.1) as transport,
            pytest.raises(GuestLost, match="the SSH connection failed"),
        ):
            transport.start(sh("exit 0"))

    def test_a_server_that_is_none(self):
        def hello():
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"220 ready\r\n" * 3)

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=hello)
            thread.start()
            with (
                transport_to(listener.getsockname(), timeout=1) as transport,
                pytest.raises(GuestLost, match="the SSH connection failed"),
            ):
                transport.start(sh("exit 0"))
            thread.join()

    def test_the_guests_own_story_is_told_first(self, host):
        def check():
            raise GuestLost("kernel panic")

        with (
            transport_to(host.address, host_key=OTHER, check=check) as transport,
            pytest.raises(GuestLost, match="kernel panic"),
        ):
            transport.start(sh("exit 0"))

    def test_leaves_no_thread(self, host):
        with transport_to(host.address) as transport:
            run(transport, sh("exit 0"))
            session = transport._session
        assert session is not None
        assert not session.is_alive()


class TestCommand:
    @pytest.mark.parametrize(
        ("script", "status"),
        [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9), ("kill -15 $$", -15)],
    )
    def test_exit_status(self, transport, script, status):
        assert run(transport, sh(script))[0] == status

    def test_both_streams(self, transport):
        assert run(transport, sh("echo out; echo err >&2")) == (0, b"out\n", b"err\n")

    def test_large_binary_input_and_output(self, transport):
        data = os.urandom(1 << 20)
        assert run(transport, Command(argv=("cat",)), stdin=data) == (0, data, b"")

    @pytest.mark.parametrize("command", FITS.values(), ids=FITS.keys())
    def test_long_commands(self, transport, command):
        assert run(transport, command) == (0, output_of(command), b"")

    @pytest.mark.parametrize("command", TOO_LONG.values(), ids=TOO_LONG.keys())
    def test_longer_commands_are_refused_as_by_subprocess(self, transport, command):
        with pytest.raises(OSError, match="Argument list too long: 'true'") as caught:
            transport.start(command)
        assert caught.value.errno == errno.E2BIG

    def test_a_long_command_has_its_own_input(self, transport):
        command = sh(f"cat; : {'x' * 100_000}")
        assert run(transport, command, stdin=b"in\0put")[1] == b"in\0put"

    def test_without_input_it_finds_the_end(self, transport):
        assert run(transport, Command(argv=("cat",))) == (0, b"", b"")

    def test_input_that_nobody_reads(self, transport):
        assert run(transport, sh("exit 3"), stdin=b"x" * (1 << 20))[0] == 3

    def test_noise_of_a_login_shell_is_no_output(self, host, transport):
        host.noise = b"Welcome!\nvmsandbox-started not this one\n"
        assert run(transport, sh("echo out"))[1] == b"out\n"

    def test_a_login_shell_that_is_not_like_others(self, host, transport, tmp_path):
        """As fish and tcsh: it has other variables, and no dollar sign is safe from it."""
        shell = tmp_path / "fish"
        shell.write_text(
            '#!/bin/sh\ncase $2 in "exec /bin/sh -c \'"*"\'") eval "$2" ;; *) echo bad =; exit 127 ;; esac\n'
        )
        shell.chmod(0o755)
        host.shell = [os.fspath(shell)]
        script = 'echo "$1"; cat; exit 3'
        for words in (["it's\n$HOME"], ["x" * 20_000]):
            command = Command(argv=("/bin/sh", "-c", script, "sh", *words))
            output = f"{words[0]}\nfed".encode()
            assert run(transport, command, stdin=b"fed") == (3, output, b"")
        assert len(host.processes) == 3  # the first line was refused, and no other

    def test_what_was_printed_before_the_error_is_kept(self, transport):
        assert run(transport, Command(argv=("no-such-program",)))[0] == 127

    def test_a_folder_that_is_not_there(self, transport):
        with pytest.raises(CommandError, match="could not be started in /no/such") as caught:
            transport.start(sh("exit 0", cwd="/no/such"))
        assert caught.value.result.returncode == 126
        assert "/no/such" in str(caught.value.result.stderr)

    def test_a_timeout_ends_its_process_group(self, host, transport):
        out = bytearray()
        process = transport.start(sh("echo started; sleep 1000 & wait"))
        with pytest.raises(CommandTimeout, match=r"did not end within 0\.1 s and was killed"):
            process.communicate(None, out.extend, out.extend, 0.1)
        process.close()
        assert out == b"started\n"
        assert host.processes[0].wait(5) == -9

    def test_a_background_process_that_holds_a_stream_is_not_waited_for(self, transport):
        started = transport.start(sh("sleep 1000 & echo $!; exec true"))
        out = bytearray()
        # A server of OpenSSH tells the end at once; this one waits for the streams: kill it.
        out += started.stdout.readline()
        os.kill(int(out), signal.SIGKILL)
        assert started.wait(5) == 0
        started.close()

    def test_a_connection_that_breaks_in_the_middle(self, host, transport, monkeypatch):
        monkeypatch.setattr(remote, "_CAUSE_SECONDS", 0.05)
        process = transport.start(sh("sleep 1000"))
        host.hang_up()
        with pytest.raises(
            GuestLost, match="the connection to the guest broke while a program ran"
        ):
            process.communicate(None, bytes, bytes, 5)
        process.close()

    def test_a_guest_that_is_lost_in_the_middle(self, host):
        lost = threading.Event()

        def check():
            if lost.is_set():
                raise GuestLost("kernel panic")

        with transport_to(host.address, check=check) as transport:
            process = transport.start(sh("sleep 1000"))
            lost.set()
            with pytest.raises(GuestLost, match="kernel panic"):
                process.communicate(None, bytes, bytes, 5)
            process.close()


class TestStepByStep:
    def test_poll_and_wait(self, transport):
        process = transport.start(sh("read line; exit 4"))
        assert process.poll() is None
        with pytest.raises(CommandTimeout, match="still runs"):
            process.wait(0.01)
        with process.stdin as stdin:
            stdin.write(b"go\n")
        assert process.wait(5) == process.poll() == 4
        process.close()

    def test_talks(self, transport):
        process = transport.start(Command(argv=("cat",)))
        stdin, stdout = process.stdin, process.stdout
        for line in (b"one\n", b"two\n"):
            stdin.write(line)
            stdin.flush()
            assert stdout.readline() == line
        stdin.close()
        assert stdout.read() == b""
        assert process.wait(5) == 0
        process.close()

    @pytest.mark.parametrize(("name", "status"), [("TERM", -15), ("KILL", -9)])
    def test_signals(self, transport, name, status):
        process = transport.start(sh("sleep 1000"))
        process.signal(name)
        assert process.wait(5) == status
        process.signal(name)  # it is gone: nothing happens
        process.close()


class TestFirstLogin:
    """Into a system from elsewhere, whose host key nobody knows yet."""

    @pytest.fixture
    def enter(self, host):
        """Log in to the host. The keys and the password are arguments."""

        def enter(user="vagrant", **how):
            first = FirstTransport(
                address=lambda: host.address,
                user=user,
                key=OTHER,
                host_key="",
                check=lambda: None,
                connect_timeout=5,
                quiet_seconds=0.5,
                **how,
            )
            try:
                return run(first, sh("echo in"))
            finally:
                first.close()

        return enter

    @pytest.mark.parametrize("kind", ["ed25519", "rsa"])
    def test_with_the_keys_of_vagrant(self, host, enter, kind):
        insecure = [path.read_text() for path in adopting.INSECURE_KEYS]
        public = {"ed25519": ssh._private_key(insecure[0]), "rsa": ssh._private_key(insecure[1])}
        assert public["ed25519"].get_base64() == VAGRANT_ED25519
        assert public["rsa"].get_base64().startswith(VAGRANT_RSA)
        key = public[kind]
        host.authorized = [f"{key.get_name()} {key.get_base64()}"]
        assert enter(private_keys=tuple(insecure)) == (0, b"in\n", b"")

    def test_with_our_key_that_something_has_added(self, host, enter):
        host.authorized = [OTHER.public]
        assert enter() == (0, b"in\n", b"")

    def test_with_a_password(self, host, enter):
        assert enter("pi", password="raspberry") == (0, b"in\n", b"")
        assert host.offered == []  # keys that nobody knows make some servers refuse us

    @pytest.mark.parametrize("how", [{}, {"password": "wrong"}])
    def test_refused(self, enter, how):
        with pytest.raises(ConfigError, match="'vagrant' cannot log in"):
            enter(**how)

    def test_the_host_key_is_noted(self, host):
        assert host_key_at(host.address, 5) == THEIRS.public

    def test_of_nobody_no_host_key_is_noted(self, nobody):
        with pytest.raises(GuestLost, match="does not show an ed25519 key"):
            host_key_at(nobody, 5)
