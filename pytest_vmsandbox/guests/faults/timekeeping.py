"""What faults do to a guest's clock, and how it becomes right again."""

from __future__ import annotations

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests.lead import Drift, Lead
from pytest_vmsandbox.guests.reaching.helper import Helper
from pytest_vmsandbox.guests.running import resume
from pytest_vmsandbox.guests.running.engine import Engine
from pytest_vmsandbox.guests.running.machines import Running


def helper_of(running: Running) -> Helper:
    """The helper of a guest, which sets its clock.

    Raises:
        ConfigError: it has none.
    """
    if (helper := running.helper) is None:
        raise ConfigError(
            f"the clock of {running.machine.spec.name} cannot be set: there is no helper in the guest",
            remedy="use an image with the helper, such as debian-13, or set the clock with vm.run()",
        )
    return helper


def set_lead(helper: Helper, lead: Lead) -> None:
    """Set a guest's clock to this host's time plus a lead, which it keeps from now on.

    Raises:
        GuestLost: the clock cannot be set. The lead is what it was.
    """
    before, helper.lead = helper.lead, lead
    try:
        resume.set_clock(helper)
    except BaseException:
        helper.lead = before
        raise


def lost_time(helper: Helper) -> Drift:
    """What a guest has lost because its CPUs stood still. From now on its clock keeps that.

    Raises:
        GuestLost: it does not answer.
    """
    now = wall()
    drift = Drift(offset=resume.measured(helper) - helper.lead.at(now), since=now)
    helper.lead = helper.lead.with_drift(drift)
    return drift


def set_right(helper: Helper) -> None:
    """Set a guest's clock to what it must show now that a fault is over.

    If another fault is in force that forbids that, that one does it at its end.

    Raises:
        GuestLost: the clock cannot be set.
    """
    if not (helper.lead.is_free or helper.is_frozen):
        resume.set_clock(helper)


def restore(engine: Engine, drift: Drift) -> None:
    """Take what a fault does from a guest's clock, and set it right.

    Nothing is done if the guest is off or gone, or has no helper.

    Raises:
        GuestLost: the clock cannot be set.
    """
    if engine.loss is not None:
        return
    with engine.use() as running:
        if (helper := running.helper) is not None:
            helper.lead = helper.lead.without(drift)
            set_right(helper)
