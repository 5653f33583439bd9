"""What a session in a guest is told: which tests it has, and how it runs them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pytest
from _pytest.junitxml import xml_key

from pytest_vmsandbox.inside import install
from pytest_vmsandbox.plugin import beside, config as options, guest_config
from pytest_vmsandbox.plugin.measuring import Measuring
from pytest_vmsandbox.plugin.plan import Plan, alike

if TYPE_CHECKING:
    from pytest_vmsandbox.plugin.run import Run


def session_config(
    run: Run,
    session: pytest.Session,
    plan: Plan,
    installed: install.Installed,
    own: Mapping[str, str],
) -> dict[str, object]:
    """The configuration of a session in a guest; see `run` in the runner's `process.py`.

    Args:
        session: of this side; the guest has those of its tests that belong into the same kind of guest.
        plan: of one of them.
        own: variables that differ between guests.
    """
    config, tree = run.config, installed.tree
    translate = guest_config.translator({str(config.rootpath): tree, **installed.outside})
    files = list(dict.fromkeys(each.file for each in alike(session.items, plan)))
    where = translate(str(config.invocation_params.dir))
    results = f"{install.BASE}/allure" if beside.AllureResults(config).are_wanted else None
    measuring = Measuring.of(config)
    xml = config.stash.get(xml_key, None)
    given, lost = guest_config.options(config, translate)
    _tell_of_losses(run, lost)
    return {
        "args": [
            *(f"--rootdir={tree}", "-c", f"{install.BASE}/session.ini"),
            "--disable-plugin-autoload",
            *guest_config.arguments(config, translate),
            *(f"{tree}/{file}" for file in files),
        ],
        "wanted": options.guest_plugins(config),
        "plugins": guest_config.plugins(config),
        "options": {**given, "allure_report_dir": results},
        "ini": [(["cache_dir"], f"{install.BASE}/cache"), *guest_config.ini(config, translate)],
        "fixtures": guest_config.fixtures(config),
        "path": list(installed.path),
        "programs": installed.programs,
        "cwd": where if where.startswith(tree) else tree,
        "environment": {**own, **options.guest_environment(config, os.environ)},
        "outcomes": guest_config.outcomes(config),
        "alone": plan.isolation == "test",
        "details": [file for file in files if file in run.unimportable],
        "measure": measuring and measuring.settings(translate),
        "tree": tree,
        "logs": beside.Logs(config).are_wanted,
        "allure": results,
        "machine": beside.machine_is_wanted(config),
        "junit": xml.family if xml else None,
        "live": config.getoption("capture", default="no") == "no",
    }


def _tell_of_losses(run: Run, options: Sequence[str]) -> None:
    """Tell what of this run's configuration no guest can have."""
    for name in guest_config.only_here(run.config):
        run.tell(
            f"the plugin {name} stays on this side: it is neither in the project nor installed"
        )
    if options:
        run.tell_problem(
            f"options that no guest can be told, so it has its defaults there: {', '.join(options)}"
        )
