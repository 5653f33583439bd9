"""The state of one pytest run: the guests of its tests, and the lines for its end."""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_vmsandbox.core.deadline import wall
from pytest_vmsandbox.core.errors import ConfigError, VMSandboxError
from pytest_vmsandbox.core.paths import lock_file
from pytest_vmsandbox.core.spec import parse_kernel
from pytest_vmsandbox.plugin import alarms, config as options, plan as plans, terminal
from pytest_vmsandbox.plugin.artifacts import Artifacts, Gatherer, telling, temporary_folder
from pytest_vmsandbox.plugin.faults import FaultsOfTests
from pytest_vmsandbox.plugin.keeping import Keeping
from pytest_vmsandbox.plugin.plan import Variant
from pytest_vmsandbox.plugin.reporting import FAILED, RETRIED

if TYPE_CHECKING:
    from pytest_vmsandbox.catalogue.catalogue import Catalogue
    from pytest_vmsandbox.core.spec import Hardware
    from pytest_vmsandbox.guests.factory import GuestFactory
    from pytest_vmsandbox.guests.guest import Guest
    from pytest_vmsandbox.guests.provision import PreparedImage, PreparedLayer, Provision
    from pytest_vmsandbox.machine.cmdline import MachineSpec


@dataclass
class _Known:
    """What we know about a guest.

    Attributes:
        guest: the guest, while it runs.
        is_noted: whether we note each use of it. We cannot note uses by fixtures of users.
        is_used: whether the current test has used it.
        has_failed: whether a test that used it has failed.
        has_come: whether it was handed out.
    """

    guest: Guest | None = None
    is_noted: bool = False
    is_used: bool = False
    has_failed: bool = False
    has_come: bool = False


class Run:
    """The state of one run, and the `Callbacks` of its guests. It costs nothing without guests.

    Attributes:
        usage_errors: errors in markers and options, found during collection.
        begun: when the run began, seconds since the epoch.
        failed: whether something went wrong that is neither a test's failure nor its error.
        told: lines for the end of the run, including those of xdist's workers.
        pulled: what became of files that tests inside guests have written, likewise.
        unimportable: test files that could not be collected here, relative to the rootdir, and the
            type of the first collector that tried: with ``--doctest-modules`` there are two.
        failed_hooks: hooks of other plugins that failed for tests inside, and were reported.
        item: the current test.
        labels: of images on kernels of the user, as ids of tests show them.
        coming: image and hardware of each fresh guest that tests will ask for.
        keeping: the guests of failed tests.
        faults: those that tests begin in their guests.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.usage_errors: list[str] = []
        self.begun = wall()
        self.failed = False
        self.told: dict[str, None] = {}
        self.pulled: defaultdict[str, dict[str, None]] = defaultdict(dict)  # see `pulling`
        self.unimportable: dict[str, type[pytest.Collector]] = {}
        self.failed_hooks: set[tuple[str, type[BaseException], str]] = set()
        self.item: pytest.Item | None = None
        self.labels: dict[str, None] = {}
        # Path → name, configuration, and whether it may have modules.
        self._kernels: dict[Path, tuple[str, dict[str, str], bool]] = {}
        self._wrong: dict[tuple[str, Path], ConfigError] = {}  # image and kernel
        self.coming: list[tuple[str, Hardware]] = []
        self._guests: defaultdict[str, _Known] = defaultdict(_Known)  # by name
        self._gatherer = Gatherer(lambda: self.artifacts, partial(_asked, config), self.tell)
        self._stack = ExitStack()
        self.keeping = Keeping(
            config,
            guests=lambda: {name: known.guest for name, known in self._guests.items()},
            used=self._used_by,
            backend=lambda: self.factory.backend,
            tell=self.tell,
        )
        self.faults = FaultsOfTests(self._running, self)

    def close(self) -> None:
        """End all remaining guests."""
        try:
            self.keeping.close()  # there may be no end of a session, as after an error of pytest's
            self._stack.close()
        finally:
            if "artifacts" in self.__dict__:
                self.artifacts.close()

    def note_usage_error(self, nodeid: str, error: ConfigError) -> None:
        """Note an error in the markers of a test. A wrong image or kernel of the run is noted once."""
        is_general = self.selection is error or error in self._wrong.values()
        text = str(error) if is_general else f"{nodeid}: {error}"
        if text not in self.usage_errors:
            self.usage_errors.append(text)

    def tell(self, text: str) -> None:
        """Print a line at the end of the run, once. It is no warning, so it fails no test."""
        text = text.encode(errors="replace").decode()  # xdist cannot send lone surrogates
        self.told[f"vmsandbox: {text}"] = None

    def tell_problem(self, text: str) -> None:
        """Print a line about a problem that is no test's failure or error. The run fails then."""
        self.failed = True
        self.tell(text)

    def note_retry(self, error: VMSandboxError, item: pytest.Item | None = None) -> None:
        """Report that a fresh guest is tried after an error: at the end, and in the test's properties."""
        if (item := item or self.item) is not None:
            item.user_properties.append((RETRIED, error.brief))
        where = f" ({item.nodeid})" if item is not None else ""
        self.tell(f"retried in a fresh guest{where}: {error.brief}")

    def note_use(self, guest: Guest) -> None:
        """Note that the current test uses a guest that other tests may share."""
        known = self._guests[guest.name]
        known.is_noted = True
        known.is_used |= self.item is not None

    # -- which images ---------------------------------------------------------------------------

    @cached_property
    def catalogue(self) -> Catalogue:
        """All images."""
        from pytest_vmsandbox.catalogue.catalogue import Catalogue

        return Catalogue(options.image_path(self.config))

    def images(self, marks: Iterable[pytest.Mark] = ()) -> list[str]:
        """The images that a test with these `vm` markers runs on.

        Raises:
            ConfigError: a marker is wrong, or a name or glob matches nothing in the catalogue.
        """
        request = plans.read_marks(marks)  # first: errors in markers are reported in any case
        if isinstance(self.selection, ConfigError):
            raise self.selection
        for glob in (*request.skip, *request.xfail):
            self.catalogue.fitting([glob])
        return plans.applicable(request, self.selection, self.catalogue)

    def variants(self, marks: Iterable[pytest.Mark] = ()) -> list[Variant]:
        """The systems that a test with these `vm` markers runs on: images, on each kernel.

        Raises:
            ConfigError: as `images`; or there is no such kernel as the options name, or an image cannot
                boot it. For a kernel of the markers, see `wrong_kernel`.
        """
        marks = list(marks)
        images = self.images(marks)
        named = plans.read_marks(marks).kernels
        folder = self.config.rootpath
        wanted = [parse_kernel(kernel, folder) for kernel in named] or options.kernels(self.config)
        return [self.variant(image, kernel) for image in images for kernel in dict.fromkeys(wanted)]

    def variant(self, image: str, kernel: Path | None) -> Variant:
        """An image on a kernel; None for the image's own.

        Raises:
            ConfigError: as `variants`.
        """
        return Variant(image) if kernel is None else self._on_kernel(image, kernel)

    def _on_kernel(self, image: str, path: Path) -> Variant:
        """An image on another kernel. An error that comes again is the same object."""
        if (image, path) not in self._wrong:
            try:
                return self._checked(image, path)
            except ConfigError as error:
                self._wrong[image, path] = error
        if path in options.kernels(self.config):
            raise self._wrong[image, path]
        # Only the tests that are left after selection have to have their kernels.
        number = [*dict.fromkeys(other for _, other in self._wrong)].index(path)
        variant = Variant(image, path, f"unusable.{number + 1}" if number else "unusable")
        self.labels[variant.label] = None
        return variant

    def wrong_kernel(self, variant: Variant) -> ConfigError | None:
        """What is wrong with the kernel that the markers of a test name; None if it is good."""
        return self._wrong.get((variant.image, variant.kernel)) if variant.kernel else None

    def _checked(self, image: str, path: Path) -> Variant:
        """An image on another kernel, after a look at both."""
        from pytest_vmsandbox.catalogue import kernels

        definition = self.catalogue.get(image)
        kernels.check_image(definition)
        for other in options.kernels(self.config):
            # First, so that their names do not depend on which tests are collected.
            with suppress(ConfigError):  # reported with the tests that run on it
                _ = other is None or self._described(other)
        release, config, may_have_modules = self._described(path)
        kernels.check_options(
            release,
            path,
            config,
            has_modules=may_have_modules,
            has_disk=definition.disk_size is not None,
            init=definition.init,
        )
        variant = Variant(image, path, release)
        self.labels[variant.label] = None
        return variant

    def _described(self, path: Path) -> tuple[str, dict[str, str], bool]:
        """A kernel's name in ids, its configuration, and whether it may have modules.

        Kernels of the same release get a number in addition.
        """
        from pytest_vmsandbox.catalogue import kernels

        if path not in self._kernels:
            kernel = kernels.find(path)
            names = {name for name, *_ in self._kernels.values()}
            numbered = (f"{kernel.release}.{number}" for number in count(2))
            name = next(n for n in chain([kernel.release], numbered) if n not in names)
            may_have = kernel.modules is not None or kernel.image is None
            self._kernels[path] = name, kernels.read_config(kernel), may_have
        return self._kernels[path]

    def kernel(self, default: Path | None) -> Path | None:
        """The kernel for guests of the current test that name none: the test's own, or the default."""
        if self.item is not None and (plan := plans.plan_of(self.item)).image:
            return plan.hardware.kernel
        if len(options.kernels(self.config)) > 1:
            self.tell(
                f"tests that only use vm_factory booted {default or 'the kernel of the image'}, the first of "
                "the selected kernels, unless they named another"
            )
        return default

    def image(self) -> str | None:
        """The image of the current test; None without one.

        A test that has no parameter for its image gets the first image that applies.

        Raises:
            ConfigError: its markers are wrong.
        """
        if self.item is None:
            return None
        planned = plans.plan_of(self.item).image
        return planned or next(iter(self.images(self.item.iter_markers("vm"))), None)

    @cached_property
    def selection(self) -> tuple[list[str], bool] | ConfigError:
        """The selected images, and whether `--vm` named them; or what is wrong with the selection."""
        patterns, from_command_line = options.selected_patterns(self.config)
        try:
            return self.catalogue.select(patterns), from_command_line
        except ConfigError as error:
            return error

    # -- guests ---------------------------------------------------------------------------------

    @cached_property
    def factory(self) -> GuestFactory:
        """Makes the guests of this run."""
        from pytest_vmsandbox.guests.factory import GuestFactory

        factory = self._stack.enter_context(GuestFactory.open(options.settings(self.config), self))
        for image, hardware in self.coming:
            factory.expect(image, hardware)
        return factory

    @cached_property
    def artifacts(self) -> Artifacts:
        """The artifacts. Without an option, they go beside pytest's other temporary folders."""
        root = options.artifacts_dir(self.config) or temporary_folder(self.config)
        return Artifacts(root, own=self.factory.backend.own)

    def artifacts_of(self, item: pytest.Item) -> Path:
        """The folder of a test, with the logs of the guests that the test may have used.

        Raises:
            OSError: there is no folder, or not all logs are in it.
        """
        for guest in self._used_by(item):
            self.artifacts.keep_logs(item.nodeid, guest)
        return self.artifacts.of_test(item.nodeid)

    def _used_by(self, item: pytest.Item) -> list[str]:
        """The guests that a test may have used. Fixtures of users may use guests unnoticed."""
        asks = "vm_factory" in getattr(item, "fixturenames", ())
        return [
            name
            for name, known in self._guests.items()
            if known.is_used or known.guest is None or (asks and not known.is_noted)
        ]

    def _running(self, names: Iterable[str] | None = None) -> list[Guest]:
        """The guests of these names that still run; without names, all that run."""
        found = [self._guests[name].guest for name in (self._guests if names is None else names)]
        return [guest for guest in found if guest is not None]

    def finish(self, item: pytest.Item) -> None:
        """Forget a test. Its artifacts stay only if it failed."""
        self.item = None
        with alarms.paused(item):
            self._finish(item)

    def _finish(self, item: pytest.Item) -> None:
        self.keeping.finish(item)
        used = self._used_by(item)
        for known in self._guests.values():
            known.is_used = False
        if "artifacts" not in self.__dict__:
            return
        if not item.stash.get(FAILED, False):
            self.artifacts.discard(item.nodeid)
            used = []
        if any(self._guests[name].has_come for name in used):
            self.keeping.advise()
        for name in used:
            known = self._guests[name]
            known.has_failed = True
            with telling(self.tell):
                self.artifacts.keep_logs(item.nodeid, name)
            if known.guest is not None:
                self._gatherer.gather(item.nodeid, known.guest)
        self._gatherer.begin()
        for name in [name for name, known in self._guests.items() if known.guest is None]:
            self.artifacts.discard_logs(name)
            del self._guests[name]

    @property
    def images_used(self) -> list[str]:
        """The images whose guests were asked for."""
        return self.factory.backend.images_used if "factory" in self.__dict__ else []

    def about(self, images: Iterable[str]) -> list[str]:
        """Lines about QEMU and the accelerator of this run, for pytest's header."""
        lines: dict[str, None] = {}
        for image in dict.fromkeys(images):
            try:
                lines[self.factory.backend.describe(image)] = None
            except VMSandboxError as error:
                lines[f"vmsandbox: {error.brief}"] = None
        if lines and (about := _about_lock(self.config)):
            lines[f"vmsandbox: {about}"] = None
        return list(lines)

    def logs(self, guest: str, was: str = "") -> Path | None:
        folder = None
        with telling(self.tell):
            folder = self.artifacts.of_logs(guest, was)
        return folder  # noqa: RET504  # None if there can be none

    def guest_begun(self, guest: str) -> None:
        if self.item is not None:
            self._guests[guest].is_used = True

    def hints(self) -> list[str]:
        """Lines for an error of a guest: where the artifacts are, and how to reproduce it."""
        if self.item is None:
            return []
        plan = plans.plan_of(self.item)
        argument = plan.file if plan.is_remote else plans.selectable(self.item)
        again = [argument, *options.which_guest(self.config)]
        lines = [f"reproduce: pytest {shlex.join(again)}"]
        with telling(self.tell):
            lines.insert(0, f"artifacts: {self.artifacts_of(self.item)}")
        return lines

    def say(self, text: str) -> None:
        """Print a line about a long wait on the terminal, even while pytest captures output."""
        terminal.say(self.config, text)

    def missing(self, error: VMSandboxError) -> NoReturn:
        if options.skip_missing(self.config):
            pytest.skip(f"{error.brief} (--vm-missing=skip)")
        raise error

    def qemu_args(self, spec: MachineSpec) -> list[str]:
        hook = self.config.hook.pytest_vmsandbox_qemu_args
        return [arg for more in hook(config=self.config, spec=spec) for arg in more]

    def provisions(self, image: str) -> list[Provision]:
        hook = self.config.hook.pytest_vmsandbox_provision
        last_first = hook(config=self.config, image=image)
        return list(reversed(last_first))

    def guest_ready(self, guest: Guest) -> None:
        known = self._guests[guest.name] = self._guests.pop(guest.name, _Known())  # in their order
        known.guest, known.has_come = guest, True
        try:
            self.config.hook.pytest_vmsandbox_guest_ready(config=self.config, guest=guest)
            self.faults.outlive_tests(guest)
        except Exception as error:
            if self.item is not None:
                self.faults.before_end(self.item, guest, error)
                self._before_end(self.item, guest, error)
            known.guest = None
            raise

    def guest_restoring(self, guest: str, error: BaseException) -> None:
        item, known = self.item, self._guests[guest].guest
        if item is None or known is None or isinstance(error, pytest.skip.Exception):
            return
        self.faults.before_restore(item, known, error)
        self._before_end(item, known, error)

    def _before_end(
        self, item: pytest.Item, guest: Guest, error: BaseException | None, *, failed: bool = True
    ) -> None:
        """Keep a guest, and look at it, before it ends or is restored. The test may expect the error."""
        with alarms.paused(item):
            self.keeping.ending(item, guest, error)
            if failed:
                certain = error is None
                self._gatherer.gather(item.nodeid, guest, error=error, is_certain=certain)

    def guest_stopping(self, guest: Guest, error: BaseException | None) -> None:
        item, failed = self.item, error is not None
        if isinstance(error, pytest.skip.Exception):
            failed, error = False, None
        if item is not None:
            if guest.name in self._used_by(item):
                failed = failed or item.stash.get(FAILED, False)
            is_looked_at = failed or self.keeping.keeps_all
            self.faults.before_end(item, guest, error, is_looked_at=is_looked_at)
            self._before_end(item, guest, error, failed=failed)
        known = self._guests[guest.name]
        known.guest = None
        self.config.hook.pytest_vmsandbox_guest_stopping(
            config=self.config, guest=guest, failed=failed or known.has_failed
        )

    # -- failures -------------------------------------------------------------------------------

    def begin_attempt(self) -> None:
        """Another attempt at the current test begins: its guests have not been looked at."""
        self._gatherer.begin()

    def at_failure(
        self,
        item: pytest.Item,
        phase: str,
        error: BaseException | str,
        **about: Any,
    ) -> None:
        """A test has failed just now, and its guests still run. This raises no error.

        Args:
            error: what was raised, or one line.
            about: what else is known, as in `guests.kept.Moment`; ``guest`` names the one that it holds for.
        """
        guests = self._running(self._used_by(item))
        with alarms.paused(item):
            self.faults.at_failure(
                item, phase, guests, error
            )  # first: a frozen guest could not be asked
            self.keeping.keep(item, phase, error, **about)
            for guest in guests:
                self._gatherer.gather(item.nodeid, guest, error=error)

    def at_success(self, item: pytest.Item) -> None:
        """The function of a test has passed, and its guests still run."""
        if self.keeping.keeps_all:
            self.faults.end_of_call(item)
            self.keeping.passed(item)

    def show(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Add to a test's report which guest it had, and what is left of it if the test failed."""
        given = dict(report.user_properties)
        if "vm" not in given and (label := plans.plan_of(item).variant.label):
            report.user_properties.append(("vm", label))
        lines = [*self.faults.shown(), *self.keeping.show(item, report)]
        has_failed = report.failed or item.stash.get(FAILED, False)
        if has_failed and "artifacts" in self.__dict__ and self._used_by(item):
            with telling(self.tell), alarms.paused(item):
                folder = self.artifacts_of(item)
                report.user_properties.append(("vm_artifacts", str(folder)))
                if (line := f"artifacts: {folder}") not in report.longreprtext:
                    lines.insert(0, line)
        if report.failed and lines:
            report.sections.append(("vmsandbox", "\n".join(lines)))

    def preparation_failed(self, guest: Guest, name: str) -> None:
        if self.item is not None:
            self.faults.before_end(self.item, guest, sys.exception())
            with alarms.paused(self.item):
                self._gatherer.gather(self.item.nodeid, guest, name)


@contextmanager
def leased(
    factory: GuestFactory, image: str | PreparedImage | PreparedLayer, plan: plans.Plan
) -> Iterator[Guest]:
    """A fresh guest for a test, on networks of its own that are gone with it."""
    with ExitStack() as stack:
        networks = [stack.enter_context(factory.network(name)) for name in plan.networks]
        yield stack.enter_context(factory.lease(image, plan.hardware, networks=networks))


class SharedGuests:
    """Guests that tests of a module or of a run share, by image, hardware and networks."""

    def __init__(self, run: Run, stack: ExitStack) -> None:
        self._run = run
        self._stack = stack
        self._guests: dict[tuple[object, ...], tuple[Guest, ExitStack]] = {}

    def get(self, image: str | PreparedImage | PreparedLayer, plan: plans.Plan) -> Guest:
        """The guest for tests with this image and such a plan. A lost guest is replaced by a fresh one."""
        key = (image, self._run.image(), plan.hardware, plan.networks)
        if key in self._guests and not self._guests[key][0].alive:
            self._guests.pop(key)[1].close()
        if key not in self._guests:
            own = self._stack.enter_context(ExitStack())
            self._guests[key] = own.enter_context(leased(self._run.factory, image, plan)), own
        guest, _ = self._guests[key]
        self._run.note_use(guest)
        return guest


def _asked(config: pytest.Config, guest: Guest) -> dict[str, str]:
    """What a guest says about itself, by the name of a file for each text."""
    from pytest_vmsandbox.guests.gathering import gathered

    return gathered(guest, secret=options.guest_environment(config).values())


def _about_lock(config: pytest.Config) -> str:
    """A line about the lock file, or about one that does not count; empty without any."""
    root = config.rootpath
    if (used := lock_file(root)) is not None:
        return f"images must be as in {used.name}"
    others = map(lock_file, (config.invocation_params.dir, *root.parents))
    other = next(filter(None, others), None)
    return f"{other} does not count, because pytest's rootdir is {root}" if other else ""
