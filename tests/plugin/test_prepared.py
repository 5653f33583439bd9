"""A preparation for whatever image a test runs on: which image that is, and how `vm` is booted from it."""

import pytest

from pytest_vmsandbox.guests import factory

assert factory  # pytester forgets what a run in this process imports, and this takes long

CONFTEST = """
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from pytest_vmsandbox import Provision
from pytest_vmsandbox.guests.factory import GuestFactory

def note(config, *words):
    with (config.rootpath / "guests").open("a") as file:
        print(*words, file=file)

@pytest.fixture(scope="session", autouse=True)
def fakes(pytestconfig):
    def build(self, prepared):
        note(pytestconfig, "prepare", prepared.image, *(step.about for step in prepared.steps))

    @contextmanager
    def lease(self, image, hardware, **_):
        prepared, usual = self._prepared(image), self.hardware("alpha-1", {})
        changed = [name for name, it in vars(hardware).items() if it != getattr(usual, name)]
        note(pytestconfig, "boot", prepared.image, *(step.about for step in prepared.steps), *changed)
        yield SimpleNamespace(name=prepared.image, alive=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuestFactory, "_build_template", build)
        patch.setattr(GuestFactory, "lease", lease)
        yield

def below(guest): pass

def pytest_vmsandbox_provision(config, image):
    return Provision(name="below", depends_on=[], run=below)

def old(guest): pass
def older(guest): pass

@pytest.fixture(scope="session")
def layer(vm_factory):
    return vm_factory.prepare(None, old, depends_on=["1.0"])
"""
OVERRIDDEN = """
import pytest

@pytest.fixture(scope="session")
def vm_prepared(layer):
    return layer
"""


@pytest.fixture
def run(bare):
    """Runs a suite."""
    bare.pytester.makeconftest(CONFTEST)

    def run(source, *args, **outcomes):
        bare.write(source)
        result = bare.run(*args)
        result.assert_outcomes(**outcomes)
        return result

    return run


def test_vm_is_booted_from_what_vm_prepared_returns(run, bare):
    source = f"{OVERRIDDEN}\n@pytest.mark.vm(cpus=2)\ndef test_a(vm): pass\ndef test_b(vm): pass"
    run(source, "--vm=alpha-*", passed=4)
    assert bare.guests == [
        "prepare alpha-1 below old",  # for the test that asked first
        *("boot alpha-1 below old cpus", "boot alpha-1 below old"),
        *("boot alpha-2 below old cpus", "boot alpha-2 below old"),
    ]


def test_it_is_overridden_where_it_is_wanted(run, bare):
    """As any fixture: for a folder, a file, or a class; and it can have parameters."""
    run("""
        import pytest
        from conftest import old, older

        def test_plain(vm): pass

        class TestUpgrade:
            @pytest.fixture(params=[old, older], ids=["old", "older"])
            def vm_prepared(self, request, vm_factory):
                return vm_factory.prepare(None, request.param, depends_on=[])

            def test_it(self, vm): pass
    """, passed=3)  # fmt: skip
    assert [line for line in bare.guests if line.startswith("boot")] == [
        "boot alpha-1 below",
        "boot alpha-1 below old",
        "boot alpha-1 below older",
    ]
    assert bare.ids()[1:] == [f"TestUpgrade::test_it[alpha-1-{it}]" for it in ("old", "older")]


def test_a_shared_guest_is_booted_from_it_once(run, bare):
    source = f"{OVERRIDDEN}\npytestmark = pytest.mark.vm(isolation='module')\n" + "".join(
        f"def test_{number}(vm): pass\n" for number in range(2)
    )
    run(source, "--vm=alpha-*", passed=4)
    assert [line for line in bare.guests if line.startswith("boot")] == [
        "boot alpha-1 below old",
        "boot alpha-2 below old",
    ]


def test_boot_takes_the_image_of_the_test_that_asks(run, bare):
    """Without the fixture vm, a test runs once: on the first image that applies to it."""
    run("""
        import pytest

        def test_a(vm_factory, layer):
            with vm_factory.boot(layer) as one, vm_factory.boot(layer, cpus=2) as two: pass

        @pytest.mark.vm("beta")
        def test_b(vm_factory, layer):
            with vm_factory.boot(layer): pass

        def test_c(vm, vm_factory, layer):
            with vm_factory.boot(layer): pass
    """, "--vm=alpha-*", "--vm=beta", passed=5)  # fmt: skip
    boots = [line.partition(" ")[2] for line in bare.guests if line.startswith("boot")]
    assert boots[:2] == ["alpha-1 below old", "alpha-1 below old cpus"]
    assert "beta below old" in boots
    for image in ("alpha-1", "alpha-2", "beta"):
        own = boots.index(f"{image} below")
        assert boots[own + 1] == f"{image} below old"


def test_it_can_be_prepared_further(run, bare):
    run("""
        from conftest import older

        def test_a(vm_factory, layer):
            with vm_factory.boot(vm_factory.prepare(layer, older, depends_on=[])): pass
    """, passed=1)  # fmt: skip
    assert bare.guests[1:] == [
        "prepare alpha-1 below old older",
        "boot alpha-1 below old older",
    ]


def test_what_is_for_another_image_is_refused(run, bare):
    run("""
        import pytest
        from conftest import old

        @pytest.fixture(scope="session")
        def vm_prepared(vm_factory):
            return vm_factory.prepare("alpha-1", old, depends_on=[])

        def test_a(vm): pass
    """, "--vm=alpha-*", passed=1, errors=1).stdout.fnmatch_lines(
        ["*this test runs on alpha-2, but the fixture vm_prepared returned an image that was prepared from alpha-1*",
         "*Remedy: let vm_prepared return vm_factory.prepare(None, …)*"]
    )  # fmt: skip
    assert [line for line in bare.guests if line.startswith("boot")] == ["boot alpha-1 below old"]


def test_a_test_to_which_no_image_applies(run, bare):
    run("""
        import pytest

        @pytest.mark.vm("beta")
        def test_a(vm_factory, layer):
            with vm_factory.boot(layer): pass
    """, "--vm=alpha-1", failed=1).stdout.fnmatch_lines(
        ["*works only while a test runs to which a selected image applies*"]
    )  # fmt: skip
