"""``vmsandbox bench``: what guests cost on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.cli.figures import guests, machine, suites, values
from pytest_vmsandbox.cli.figures.guests import Site
from pytest_vmsandbox.cli.figures.values import CannotMeasureError, Figure
from pytest_vmsandbox.cli.options import GuestWish, guest_options
from pytest_vmsandbox.cli.screen import Screen, write_json
from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine.qemu import find_qemu

MEASURES: dict[str, Callable[[Site], Figure]] = {
    "cold_boot_s": guests.cold_boot,
    "clone_on_demand_ms": guests.clone_on_demand,
    "armed_noop_ms": guests.armed_noop,
    "armed_run_ms": guests.armed_run,
    "guests_per_s": guests.guests_per_s,
    "cpu_ms_per_guest": guests.cpu_per_guest,
    "pss_mib_per_clone": guests.pss_per_clone,
    "leased_at_once": guests.leased_at_once,
    "running_at_once": guests.running_at_once,
    "push_mib_s": guests.push,
    "second_run_s": suites.second_run,
    "in_guest_overhead_ms": suites.in_guest_overhead,
    "in_guest_isolated_s": suites.in_guest_isolated,
    "idle_cost_ms": suites.idle_cost,
}


class _Help(click.Command):
    """Its help ends with what the figures are."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """See `click.Command`."""
        with formatter.section("Figures"):
            formatter.write_dl(list(values.MEANINGS.items()))


@click.command(cls=_Help)
@click.argument("image", default=DEFAULT_IMAGE)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(values.KEYS),
    metavar="KEY",
    help="Measure this figure; repeatable. A time takes a cold boot along, for its ratio.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Samples of a figure, instead of as many as it takes to be trusted.",
)
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    metavar="N",
    help="Guests at once, for the figures that are about many.",
)
@guest_options
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    *,
    image: str,
    as_json: bool,
    only: tuple[str, ...],
    count: int | None,
    most: int,
    **options: str | None,
) -> None:
    """Measure on this machine what guests cost.

    Figures are medians, in the unit that their name ends with. Each time comes with how many times
    it goes into the cold boot of the same run: that compares with other machines, the time does not.
    What cannot be measured here is left out, and why is said; with --only the exit status is 1 then.
    All figures together take minutes under KVM, and much longer where there is only emulation.
    """
    wish = GuestWish.read(**options)  # type: ignore[arg-type]  # click has read them
    hardware = wish.settings.hardware.changed(wish.hardware)
    definition = Catalogue(wish.settings.image_path).get(image)
    wanted = values.in_order(only or values.KEYS)
    with tempfile.TemporaryDirectory(prefix="vmsandbox-bench-") as folder:
        screen = Screen(stderr=True)
        site = Site(
            image=image,
            settings=wish.settings,
            hardware=wish.hardware,
            folder=Path(folder),
            count=count,
            most=most,
            python=definition.python,
            systemd=definition.init == "systemd",
            wanted=wanted,
            say=screen.say,
        )
        about = {
            "image": image,
            "cpus": hardware.cpus,
            "memory_bytes": hardware.memory,
            **_surroundings(site, definition.architecture),
        }
        figures = measure(site, wanted, screen)
    if as_json:
        write_json({**about, **_content(figures, wanted)})
    else:
        _show(Screen(), about, figures, wanted)
    ctx.exit(1 if any(figures[key].value is None for key in only) else 0)


def measure(site: Site, wanted: Iterable[str], screen: Screen) -> dict[str, Figure]:
    """The figures that are wanted, and the cold boot where one of them is a time."""
    keys = list(wanted)
    if any(values.seconds_of(key) is not None for key in keys):
        keys = values.in_order([values.COLD, *keys])
    found = {}
    with screen.stages() as stage:
        for key in keys:
            stage(f"{key}: {values.MEANINGS[key]}")
            try:
                found[key] = MEASURES[key](site)
            except CannotMeasureError as error:
                found[key] = Figure(value=None, reason=str(error))
            except VMSandboxError as error:
                found[key] = Figure(value=None, reason=error.brief)
    return found


def _surroundings(site: Site, architecture: str) -> dict[str, Any]:
    """Where it is measured.

    Raises:
        VMSandboxError: no guest of that image can run here.
    """
    with site.factory("never") as factory:
        verdict = factory.accelerator(site.image)
    return {
        "machine": machine.describe(),
        "qemu": find_qemu(architecture).release,
        "accelerator": verdict.accelerator,
    }


def _content(figures: Mapping[str, Figure], wanted: Iterable[str]) -> dict[str, object]:
    """What ``--json`` says of the figures; the cold boot is told as soon as it was measured."""
    shown = values.in_order([*wanted, *figures])
    return {
        **{key: figures[key].value for key in shown},
        "samples": {key: figures[key].samples for key in shown},
        "ratios": values.ratios(figures),
        "reasons": {key: figures[key].reason for key in shown if figures[key].reason},
        "details": {key: dict(figures[key].details) for key in shown if figures[key].details},
    }


# -- for people ------------------------------------------------------------------------------------


def _show(
    screen: Screen, about: Mapping[str, Any], figures: Mapping[str, Figure], wanted: Iterable[str]
) -> None:
    where = about["machine"]
    screen.say(
        f"{about['image']}, {format_size(about['memory_bytes'])}; QEMU {about['qemu']}, "
        f"{about['accelerator']}; {where['processors']} × {where['processor']}, "
        f"{format_size(where['memory_bytes'])}, load {where['load']:g}"
    )
    ratios = values.ratios(figures)
    shown = values.in_order([*wanted, *figures])
    width = max(map(len, shown))
    for key in shown:
        figure = figures[key]
        screen.parts(
            (f"{key:{width}}", "bold"),
            (f"  {_number(figure.value):>24}", "" if figure.value is not None else "dim"),
            (f"  {_ratio(ratios.get(key)):>16}", "green"),
            (f"  {_samples(figure)}", "dim"),
        )


def _number(value: object) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_number(part)}" for name, part in value.items())
    return "-" if value is None else f"{value:g}"


def _ratio(ratio: object) -> str:
    if isinstance(ratio, Mapping):
        return " / ".join(_ratio(part) or "-" for part in ratio.values())
    return f"1 : {ratio:,g}" if isinstance(ratio, float | int) else ""


def _samples(figure: Figure) -> str:
    """How many there were, and why there is no figure: its first line."""
    reason = figure.reason.splitlines()[0] if figure.reason else ""
    if figure.value is None:
        return reason
    count = f"{figure.samples} sample{'' if figure.samples == 1 else 's'}"
    return f"{count}; {reason}" if reason else count
