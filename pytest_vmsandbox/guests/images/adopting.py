"""The first boot of a system from elsewhere: we log in once, and leave a key of the image's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_vmsandbox.cache.store import PRIVATE_KEY
from pytest_vmsandbox.catalogue.definition import DEFINITION_FILE, ImageDefinition
from pytest_vmsandbox.catalogue.making import Build
from pytest_vmsandbox.catalogue.origin import ADOPTED
from pytest_vmsandbox.catalogue.store import HOST_KEY, PACKAGES
from pytest_vmsandbox.core.deadline import Deadline
from pytest_vmsandbox.core.errors import (
    CommandError,
    CommandTimeout,
    ConfigError,
    GuestLost,
    ImageError,
)
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.guest import Guest
from pytest_vmsandbox.guests.images import changing, examining, started
from pytest_vmsandbox.guests.images.changing import Lines
from pytest_vmsandbox.guests.reaching.access import KeyPair
from pytest_vmsandbox.guests.reaching.commands import Command, ignore
from pytest_vmsandbox.guests.reaching.ssh import FirstTransport, host_key_at
from pytest_vmsandbox.guests.reaching.ways_in import check_network
from pytest_vmsandbox.guests.running.machines import Running

_SSH_PORT = 22
_CONNECT_SECONDS = 20.0
_LOGIN_SECONDS = 30.0  # for all tries, on a usual host with KVM
_PAUSE_SECONDS = 5.0  # between tries: newer servers keep clients out that fail too often
_SILENT_SECONDS = 300.0  # of cloud-init
_LAST_TRIES = 3
_CLOUD_INIT_ENDED = re.compile(r"Cloud-init v\. \S+ finished at ")

# The well-known keys of the Vagrant project (the folder `keys` of its repository). They open each new box.
INSECURE_KEYS = [
    Path(__file__).with_name("insecure_keys") / name
    for name in ("vagrant.key.ed25519", "vagrant.key.rsa")
]

# Arguments: the public key, and who logs in. The first value of a key in sshd_config counts.
_ADOPT = """
set -e
umask 077
key=$1 user=$2
if command -v cloud-init; then
    cloud-init status --wait || :
    : >/etc/cloud/cloud-init.disabled
fi
give() {
    home=$(awk -F: -v name="$1" '$1 == name { print $6 }' /etc/passwd)
    mkdir -p "$home/.ssh"
    rm -f "$home/.ssh/authorized_keys" "$home/.ssh/authorized_keys2"
    echo "$key" >"$home/.ssh/authorized_keys"
    chmod 0700 "$home/.ssh"
    chown -R "$1:" "$home/.ssh"
    ! command -v restorecon || restorecon -R "$home/.ssh" || :
}
give root
[ "$user" = root ] || give "$user"
if grep -q '^root:!' /etc/shadow 2>/dev/null; then
    usermod -p '*' root || sed -i 's/^root:![^:]*:/root:*:/' /etc/shadow
fi
case $(awk -F: '$1 == "root" { print $7 }' /etc/passwd) in
*/nologin | */false) usermod -s /bin/sh root || sed -i '/^root:/s|[^:]*$|/bin/sh|' /etc/passwd ;;
esac
config=/etc/ssh/sshd_config
if [ -f $config ]; then
    [ -f /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
    {
        echo 'PermitRootLogin without-password'
        echo 'PubkeyAuthentication yes'
        echo 'AuthorizedKeysFile .ssh/authorized_keys'
        echo 'UseDNS no'
        ! grep -qi '^[[:space:]]*AllowUsers' $config || echo "AllowUsers root $user"
        ! grep -qi '^[[:space:]]*HostKey' $config || echo 'HostKey /etc/ssh/ssh_host_ed25519_key'
        cat $config
    } >/etc/ssh/vmsandbox.new
    cat /etc/ssh/vmsandbox.new >$config
    rm /etc/ssh/vmsandbox.new
    systemctl reload ssh || systemctl reload sshd || rc-service sshd reload || pkill -HUP -o -x sshd || kill -HUP "$(cat /run/sshd.pid)"
fi 2>&1
"""
_TO_ROOT: tuple[tuple[str, ...], ...] = (("sudo", "-n"), ("doas", "-n"))


def adopt(build: Build, settings: Settings) -> Mapping[str, object]:
    """Boot what is in the folder of a build for the first time, and make it an image of ours.

    Returns:
        What was found in the guest, for the record.

    Raises:
        ImageError: nobody can log in as the definition says, or it says something that is not so.
        BootError: the guest does not come up.
    """
    definition = build.definition
    if definition.login.method == "none":
        return {}  # nobody logs in
    has_own_key = definition.login.method in ADOPTED
    key = KeyPair.generate()
    if has_own_key:
        key.save(build.out / PRIVATE_KEY)
    image = changing.Unfinished(definition=definition, digest=definition.digest, folder=build.out)
    hardware = changing.hardware_for(image, disk=definition.disk_size, network="isolated")
    further: list[bytes] = []
    if definition.login.method == "cloud-init":
        from pytest_vmsandbox.guests.images.seed import seed  # slow to import, and rarely needed

        further.append(seed(definition.name, key.public))
    build.say("booting it for the first time")
    with changing.changing(build, image, hardware, settings, key, further=further) as guest:
        with guest.engine.use() as running:
            if has_own_key:
                _leave_key(build, guest, running, key)
            _note_host_key(build, guest, running)
        if definition.disk_size is not None:
            changing.grow(build, guest)
        found = examining.check(guest, definition)
        started.await_started(guest, definition.init)
        if packages := examining.packages(guest):
            (build.out / PACKAGES).write_text(packages, encoding="utf-8")
        changing.clean(build, guest)
        return found


def _leave_key(build: Build, guest: Guest, running: Running, key: KeyPair) -> None:
    """Log in as the definition says, and leave our key instead of what was there.

    Raises:
        ImageError: nobody can log in so, or that user cannot become root.
    """
    definition = build.definition
    login = definition.login
    user = login.user or ("vagrant" if login.method == "vagrant" else definition.user)
    build.say(f"logging in as {user}")
    insecure = INSECURE_KEYS if login.method == "vagrant" else []
    transport = FirstTransport(
        address=lambda: running.machine.forward(_SSH_PORT),
        user=user,
        key=key,
        host_key="",
        check=running.machine.check,
        connect_timeout=guest.engine.stretch(_CONNECT_SECONDS),
        quiet_seconds=running.resident.quiet_seconds,
        private_keys=tuple(path.read_text(encoding="utf-8") for path in insecure),
        password=login.password,
    )
    try:
        seconds = guest.engine.stretch(_LOGIN_SECONDS)
        if login.method == "cloud-init":  # it adds our key when the server already runs
            seconds = guest.engine.boot_seconds
        _await_login(definition, transport, running, Deadline(seconds))
        prefix = _way_to_root(definition, transport, user)
        words = (*prefix, "/bin/sh", "-c", _ADOPT, "sh", key.public, user)
        if status := _run(build, transport, words, guest.engine.stretch(_SILENT_SECONDS)):
            raise ImageError(
                f"our key could not be left in the guest: a command ended with {status}"
            )
    finally:
        transport.close()


def _await_login(
    definition: ImageDefinition, transport: FirstTransport, running: Running, deadline: Deadline
) -> None:
    """Try to log in until it works.

    Raises:
        ImageError: it does not work in time.
    """
    tries = _LAST_TRIES  # after cloud-init has ended, if the console shows that
    while True:
        try:
            transport.start(Command(argv=("true",))).close()
        except (ConfigError, GuestLost) as error:
            transport.check()
            tries -= _CLOUD_INIT_ENDED.search(running.machine.console.this_boot) is not None
            if deadline.expired or tries <= 0:
                raise ImageError(
                    f"nobody can log in to the guest as {transport.user!r}, "
                    f"{deadline.elapsed:.0f} s after its SSH server answered",
                    details=f"{error.brief}\n{running.machine.console_lines()}",
                    remedy=f"correct [login] in {definition.folder / DEFINITION_FILE}: method "
                    f"(now {definition.login.method!r}), user and password",
                ) from error
            deadline.pause(_PAUSE_SECONDS)
        else:
            return


def _way_to_root(
    definition: ImageDefinition, transport: FirstTransport, user: str
) -> tuple[str, ...]:
    """The beginning of a command line that makes `user` root.

    Raises:
        ImageError: that user cannot become root without a password.
    """
    if user == "root":
        return ()
    for prefix in _TO_ROOT:
        process = transport.start(Command(argv=("/bin/sh", "-c", '"$@" true', "sh", *prefix)))
        try:
            if process.communicate(None, ignore, ignore, transport.connect_timeout) == 0:
                return prefix
        except CommandTimeout:
            continue
        finally:
            process.close()
    raise ImageError(
        f"{user!r} cannot become root in the guest: neither sudo nor doas works without a password",
        remedy=f"name another user in [login] of {definition.folder / DEFINITION_FILE}",
    )


def _run(build: Build, transport: FirstTransport, words: Sequence[str], idle: float) -> int:
    """Run a program in the guest. Its output goes into the log. Returns its status."""
    log = Lines(build)
    process = transport.start(Command(argv=tuple(words)))
    try:
        return process.communicate(None, log.feed, log.feed, math.inf, idle)
    except CommandTimeout as late:
        raise ImageError(f"the first boot failed: {late.brief}") from late
    finally:
        process.close()
        log.end()


def _note_host_key(build: Build, guest: Guest, running: Running) -> None:
    """Note the guest's host key, and check that root can log in with our key.

    Raises:
        ImageError: root cannot log in.
        GuestLost: the guest has no such key.
    """
    check_network(running.machine, running.blueprint, running.machine.check)
    address = running.machine.forward(_SSH_PORT)
    known = host_key_at(address, guest.engine.stretch(_CONNECT_SECONDS))
    (build.out / HOST_KEY).write_text(f"{known}\n", encoding="utf-8")
    try:
        running.start_by_ssh(Command(argv=("true",)), "root").close()
    except (ConfigError, CommandError) as error:
        raise ImageError(
            "root cannot log in to the guest with the image's key",
            details=error.brief,
            remedy="look at the settings of its SSH server",
        ) from error
