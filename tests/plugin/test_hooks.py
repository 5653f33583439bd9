"""What the hooks return that say how a guest is made; `test_fixtures` has those that are told of it."""

from pytest_vmsandbox.guests import factory

assert factory  # pytester forgets what a run in this process imports, and this takes long

PLUGIN = """
from pytest_vmsandbox import Provision

asked = []

def run(guest):
    guest.append("{name}")

def pytest_vmsandbox_provision(config, image):
    asked.append(image)
    assert config.getoption("--vm") == ["alpha-1"]
    if image == "{image}":
        return Provision(name="{name}", depends_on=["{name}"], run=run, network="nat")

def pytest_vmsandbox_qemu_args(config, spec):
    assert config.getoption("--vm") == ["alpha-1"]
    return ("-name", "{name}-" + str(spec.hardware.cpus))
"""


def make(bare):
    """Two plugins that want the same image, and a conftest file that wants another one."""
    for name in ("one", "two"):
        bare.write(PLUGIN.format(name=name, image="alpha-1"), name)
    bare.pytester.makeconftest(PLUGIN.format(name="three", image="beta"))


def run(bare, source):
    bare.write(source)
    bare.pytester.syspathinsert()
    bare.run("-p", "one", "-p", "two", "--vm=alpha-1").assert_outcomes(passed=1)


def test_provisions_lie_on_each_other_in_the_order_in_which_plugins_registered(bare):
    make(bare)
    run(bare, """
        import one, two
        from pytest_vmsandbox import Provision

        def test_x(vm_factory):
            assert one.asked == two.asked == []  # nobody has asked for a guest yet
            mine = Provision(name="mine", depends_on=[], run=lambda guest: guest.append("mine"))
            steps = vm_factory.with_step("alpha-1", mine.step()).steps
            assert [it.about for it in steps] == ["one", "two", "mine"]
            assert [it.network for it in steps] == ["nat", "nat", None]
            guest = []
            for it in steps:
                it.run(guest)
            assert guest == ["one", "two", "mine"]
            for image, names in {"alpha-1": ["one", "two"], "beta": ["three"]}.items():
                for _ in range(2):
                    assert [it.about for it in vm_factory._prepared(image).steps] == names
            assert one.asked == ["alpha-1", "beta"]  # once for each
    """)  # fmt: skip


def test_no_provisions(bare):
    make(bare)
    run(bare, "def test_x(vm_factory): assert vm_factory._prepared('alpha-2').steps == ()")


def test_arguments_for_qemu(bare):
    """Those of all plugins arrive, for the guest that they were asked about; the order is pluggy's."""
    make(bare)
    run(bare, """
        from types import SimpleNamespace

        from pytest_vmsandbox.core.architecture import ARCHITECTURES
        from pytest_vmsandbox.core.spec import Hardware
        from pytest_vmsandbox.guests import backend
        from pytest_vmsandbox.machine.cmdline import MachineSpec

        def test_x(vm_factory, monkeypatch):
            here = vm_factory.backend
            for name in ("find_qemu", "find_firmware"):
                monkeypatch.setattr(backend, name, lambda *args: None)
            built = SimpleNamespace(definition=here.catalogue.get("alpha-1"))
            monkeypatch.setattr(here, "built", lambda image: built)
            monkeypatch.setattr(here, "accelerator", lambda image: None)
            spec = MachineSpec(
                name="alpha-1-1", qemu="qemu", version=(7, 2), accelerator="tcg",
                architecture=ARCHITECTURES["x86_64"], processor="Nehalem", hardware=Hardware(cpus=3),
            )
            argv = vm_factory.backend.blueprint("alpha-1", Hardware()).qemu_args(spec)
            assert argv[::2] == ["-name"] * 3
            assert sorted(argv[1::2]) == ["one-3", "three-3", "two-3"]
    """)  # fmt: skip
