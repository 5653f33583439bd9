"""``vmsandbox bench``: what guests cost on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from inspect import getdoc
from pathlib import Path
from typing import Any

import click

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.cli.benchmark import guests, keeping, suites
from pytest_vmsandbox.cli.benchmark.guests import Result, Setup
from pytest_vmsandbox.cli.examine import describe
from pytest_vmsandbox.cli.options import guest_options
from pytest_vmsandbox.cli.screen import Screen, write_json
from pytest_vmsandbox.core.errors import VMSandboxError
from pytest_vmsandbox.core.settings import DEFAULT_IMAGE, Settings
from pytest_vmsandbox.core.spec import format_size
from pytest_vmsandbox.machine.qemu import find_qemu

COLD = "cold_boot_s"
MEASUREMENTS: dict[str, Callable[[Setup], Result]] = {
    COLD: guests.cold_boot,
    "clone_on_demand_ms": guests.clone_on_demand,
    "armed_noop_ms": guests.armed_noop,
    "armed_run_ms": guests.armed_run,
    "guests_per_s": guests.guests_per_s,
    "cpu_ms_per_guest": guests.cpu_per_guest,
    "pss_mib_per_clone": guests.pss_per_clone,
    "leased_at_once": guests.leased_at_once,
    "running_at_once": guests.running_at_once,
    "push_mib_s": guests.push,
    "snapshot_save_ms": keeping.snapshot_save,
    "keep_ms": keeping.keep,
    "enter_ms": keeping.enter,
    "second_run_s": suites.second_run,
    "in_guest_overhead_ms": suites.in_guest_overhead,
    "in_guest_isolated_s": suites.in_guest_isolated,
    "idle_cost_ms": suites.idle_cost,
}


def meaning(key: str) -> str:
    """A description of a figure: the first sentence of the docstring of its function."""
    first = (getdoc(MEASUREMENTS[key]) or key).splitlines()[0].removesuffix(".")
    return first[0].lower() + first[1:]


class _Help(click.Command):
    """Adds the list of figures to the help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Figures"):
            formatter.write_dl([(key, meaning(key)) for key in MEASUREMENTS])


@click.command(cls=_Help)
@click.argument("image", default=DEFAULT_IMAGE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(list(MEASUREMENTS)),
    metavar="KEY",
    help="Measure only this figure. Repeatable. For a time, a cold boot is measured, too, for the ratio.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of samples of each figure (default: enough to be reliable).",
)
@click.option(
    "--most",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    metavar="N",
    help="Number of guests at once, for figures about many guests.",
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
    settings: Settings,
    hardware: Mapping[str, str],
) -> None:
    """Measure on this machine what guests cost.

    Figures are medians. Their unit is at the end of their name. Each time is also shown as a ratio to
    the cold boot of the same run: use the ratio to compare machines. If a figure cannot be measured, the
    reason is shown, and with --only the exit status is 1. All figures together take minutes under KVM,
    and much longer under emulation.
    """
    spec = settings.hardware.changed(hardware)
    definition = Catalogue(settings.image_path).get(image)
    with tempfile.TemporaryDirectory(prefix="vmsandbox-bench-") as folder:
        screen = Screen(stderr=True)
        setup = Setup(
            image=definition.name,
            settings=settings,
            hardware=hardware,
            folder=Path(folder),
            count=count,
            most=most,
            python=definition.in_vm,
            only_for_ratios=bool(only) and COLD not in only,
            say=screen.say,
        )
        about = {
            "image": definition.name,
            "cpus": spec.cpus,
            "memory_bytes": spec.memory,
            **_environment(setup, definition.architecture),
        }
        results = measure(setup, only or MEASUREMENTS, screen)
    if as_json:
        write_json({**about, **_content(results)})
    else:
        _show(Screen(), about, results)
    ctx.exit(1 if any(results[key].value is None for key in only) else 0)


def measure(setup: Setup, wanted: Iterable[str], screen: Screen) -> dict[str, Result]:
    """The wanted results, and the cold boot if one of them is a time."""
    keys = set(wanted)
    if any(seconds_of(key) is not None for key in keys):
        keys.add(COLD)
    results = {}
    with screen.stages() as stage:
        for key in (key for key in MEASUREMENTS if key in keys):
            stage(f"{key}: {meaning(key)}")
            try:
                results[key] = MEASUREMENTS[key](setup)
            except VMSandboxError as error:
                why = getattr(error, "why_booted", "")
                details = {"why_booted": why} if why else {}
                results[key] = Result(value=None, reason=error.brief, details=details)
    return results


def _environment(setup: Setup, architecture: str) -> dict[str, Any]:
    """The machine, QEMU and accelerator of a measurement.

    Raises:
        VMSandboxError: no guest of that image can run here.
    """
    with setup.factory("never") as factory:
        verdict = factory.backend.accelerator(setup.image)
    return {
        "machine": describe(),
        "qemu": find_qemu(architecture).release,
        "accelerator": verdict.accelerator,
    }


def _content(results: Mapping[str, Result]) -> dict[str, object]:
    """The results for ``--json``."""
    return {
        **{key: result.value for key, result in results.items()},
        "samples": {key: result.samples for key, result in results.items()},
        "ratios": ratios(results),
        "reasons": {key: result.reason for key, result in results.items() if result.reason},
        "details": {key: dict(result.details) for key, result in results.items() if result.details},
    }


def seconds_of(key: str) -> float | None:
    """The unit of a time in seconds; None for a figure that is no time.

    Args:
        key: the name of the figure, which ends with its unit.
    """
    if key in ("guests_per_s", "push_mib_s"):
        return None
    return 0.001 if "_ms" in key else 1.0 if key.endswith("_s") else None


def ratios(results: Mapping[str, Result]) -> dict[str, object]:
    """The ratio of the cold boot to each measured time."""
    whole = results[COLD].value if COLD in results else None
    if not isinstance(whole, float | int):
        return {}
    return {
        key: _ratio_of(whole, result.value, unit)
        for key, result in results.items()
        if result.value is not None and (unit := seconds_of(key)) is not None
    }


def _ratio_of(whole: float, value: object, unit: float) -> object:
    if isinstance(value, Mapping):
        return {name: _ratio_of(whole, part, unit) for name, part in value.items()}
    if not isinstance(value, float | int) or value <= 0:
        return None
    ratio = whole / (value * unit)
    return round(ratio) if ratio >= 100 else float(f"{ratio:.3g}")


# -- for people ------------------------------------------------------------------------------------


def _show(screen: Screen, about: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    where = about["machine"]
    screen.say(
        f"{about['image']}, {format_size(about['memory_bytes'])}; QEMU {about['qemu']}, "
        f"{about['accelerator']}; {where['processors']} × {where['processor']}, "
        f"{format_size(where['memory_bytes'])}, load {where['load']:g}"
    )
    compared = ratios(results)
    width = max(map(len, results))
    for key, result in results.items():
        screen.parts(
            (f"{key:{width}}", "bold"),
            (f"  {_number(result.value):>24}", "" if result.value is not None else "dim"),
            (f"  {_ratio(compared.get(key)):>16}", "green"),
            (f"  {_samples(result)}", "dim"),
        )


def _number(value: object) -> str:
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_number(part)}" for name, part in value.items())
    return "-" if value is None else f"{value:g}"


def _ratio(ratio: object) -> str:
    if isinstance(ratio, Mapping):
        return " / ".join(_ratio(part) or "-" for part in ratio.values())
    return f"1 : {ratio:,g}" if isinstance(ratio, float | int) else ""


def _samples(result: Result) -> str:
    """The number of samples, or the reason why there is no value."""
    reason = result.reason or ""
    if result.value is None:
        return reason
    count = f"{result.samples} sample{'' if result.samples == 1 else 's'}"
    return f"{count}; {reason}" if reason else count
