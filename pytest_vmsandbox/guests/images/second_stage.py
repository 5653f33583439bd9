"""The second stage of an image whose recipe could only unpack its system: a guest configures it.

Programs of another architecture run on this machine only if the kernel lets us name an emulator for
them. Where it does not, the recipe leaves in the disk what is to be done, and says so by a file. The
disk is booted, and the guest does the rest with its own programs.
"""

from __future__ import annotations

from dataclasses import replace

from pytest_vmsandbox.catalogue.making import SECOND_STAGE, Build
from pytest_vmsandbox.catalogue.store import HOST_KEY, PACKAGES
from pytest_vmsandbox.core.settings import Settings
from pytest_vmsandbox.guests.images import changing
from pytest_vmsandbox.guests.images.changing import Unfinished
from pytest_vmsandbox.guests.reaching.access import KeyPair

_FOLDER = "/second-stage"  # in the guest, as the recipe made it; it is gone afterwards
_RESULTS = "/run/second-stage/out"
# On a usual host with KVM. There it takes about half a minute, and Python compiles itself for some seconds without
# a word. Emulated, on a busy machine, that was four minutes.
_SILENT_SECONDS = 180.0
_LONGEST_SECONDS = 1200.0


def is_due(build: Build) -> bool:
    """Whether a recipe has only unpacked the system of its image."""
    return (build.out / SECOND_STAGE).exists()


def complete(build: Build, settings: Settings) -> None:
    """Boot the disk of an unpacked system, and have the guest configure it.

    Raises:
        ImageError: something failed in the guest, or it was silent for too long.
        BootError: the guest does not come up.
    """
    definition = build.definition
    first = replace(definition, append=f"{definition.append} init={_FOLDER}/init")
    image = Unfinished(definition=first, digest=definition.digest, folder=build.out)
    hardware = changing.hardware_for(image, disk=definition.disk_size, network="isolated")
    build.say("booting it: the guest configures its packages")
    with changing.changing(build, image, hardware, settings, KeyPair.generate()) as guest:
        changing.run(
            build,
            guest,
            f"exec {_FOLDER}/run",
            what="the second stage",
            silent=_SILENT_SECONDS,
            longest=_LONGEST_SECONDS,
        )
        for name in (HOST_KEY, PACKAGES):
            text = guest.shell(f"cat {_RESULTS}/{name}", user="root").stdout
            (build.out / name).write_text(text, encoding="utf-8")
    (build.out / SECOND_STAGE).unlink()
