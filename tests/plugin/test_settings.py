"""Each ini key and option arrives where it is used; `test_usage` has what is invalid."""

import pytest

from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.guests import backend
from pytest_vmsandbox.inside.install import Payload
from support.inside import Suite

assert backend  # pytester forgets what a run in this process imports, and this takes long
MIB = 1 << 20


# -- what the factory is opened with ----------------------------------------------------------------

SETTINGS = [
    ("vm_cpus = 3", "", "hardware.cpus", 3),
    ("vm_memory = 384MiB", "", "hardware.memory", 384 * MIB),
    ("vm_disk = 1.5GiB", "", "hardware.disk", 1536 * MIB),
    ("vm_network = nat", "", "hardware.network", "nat"),
    ("vm_network = isolated", "", "hardware.network", "isolated"),
    ("vm_user = tester", "", "hardware.user", "tester"),
    ("vm_accel = tcg", "", "accelerator", "tcg"),
    ("vm_accel = kvm", "", "accelerator", "kvm"),
    ("", "--vm-accel=tcg", "accelerator", "tcg"),
    ("vm_accel = kvm", "--vm-accel=auto", "accelerator", "auto"),
    ("vm_boot_timeout = 12.5", "", "boot_timeout", 12.5),
    ("", "--vm-boot-timeout=13", "boot_timeout", 13.0),
    ("vm_boot_timeout = 12.5", "--vm-boot-timeout=13", "boot_timeout", 13.0),
    ("vm_command_timeout = 7", "", "command_timeout", 7.0),
    ("vm_offline = true", "", "offline", True),
    ("", "--vm-offline", "offline", True),
]
DEFAULTS = {
    "hardware.cpus": 1,
    "hardware.memory": 512 * MIB,
    "hardware.disk": None,
    "hardware.network": "isolated",
    "hardware.user": "",  # the image's
    "accelerator": "auto",
    "boot_timeout": 60.0,
    "command_timeout": 60.0,
    "offline": False,
}


@pytest.mark.parametrize(
    ("ini", "option", "changed"),
    [
        pytest.param("", "", {}, id="nothing"),
        *(
            pytest.param(ini, option, {name: value}, id=f"{ini} {option}".strip())
            for ini, option, name, value in SETTINGS
        ),
    ],
)
def test_a_setting_of_the_factory(bare, ini, option, changed):
    bare.ini(f"[pytest]\n{ini}\n")
    bare.write(f"""
        from operator import attrgetter

        NAMES = {list(DEFAULTS)}

        def test_x(vm_factory):
            values = attrgetter(*NAMES)(vm_factory.backend.settings)
            assert dict(zip(NAMES, values, strict=True)) == {DEFAULTS | changed}
    """)
    bare.run(*option.split()).assert_outcomes(passed=1)


# -- what is made ready for tests inside guests -------------------------------------------------------


@pytest.fixture
def payload(bare, monkeypatch):
    """Run a test inside a guest, up to what it needs there; what that is made from."""

    def payload(ini, *options):
        asked = []

        def of(root, **how):
            asked.append(how)
            raise ConfigError("this is all")

        monkeypatch.setattr(backend.Backend, "require", lambda *_: None)  # there is no QEMU
        monkeypatch.setattr(Payload, "of", of)
        definition = bare.path / "images" / "alpha-1" / "image.toml"
        definition.write_text(definition.read_text().replace("python = false", "python = true"))
        bare.ini(f"[pytest]\nvm_image_path = images\nvm_images = alpha-1\n{ini}\n")
        bare.write("import pytest\n\n@pytest.mark.in_vm\ndef test_x(): pass")
        result = bare.run(*options)
        result.assert_outcomes(errors=1)
        result.stdout.fnmatch_lines(["*ConfigError: this is all"])
        (how,) = asked
        return how

    return payload


@pytest.mark.parametrize(
    ("ini", "options", "offline"),
    [
        ("", (), False),
        ("vm_offline = true", (), True),
        ("", ("--vm-offline",), True),
        ("vm_offline = false", ("--vm-offline",), True),
        ("vm_offline = false", (), False),
    ],
)
def test_offline(payload, ini, options, offline):
    assert payload(ini, *options)["offline"] is offline


@pytest.mark.parametrize(
    ("ini", "pushed"),
    [("", []), ("vm_push = build/lib 'a name'", ["build/lib", "a name"])],
    ids=["nothing", "two"],
)
def test_push(payload, bare, ini, pushed):
    for name in pushed:
        (bare.path / name).mkdir(parents=True)
    assert payload(ini)["more"] == [*pushed, "test_suite.py"]  # the tests go in any case


# -- where tests inside guests run, and how ------------------------------------------------------------


@pytest.fixture
def inside(tmp_path_factory):
    """A suite whose guests are this machine, as in `tests/differential`."""
    return Suite(tmp_path_factory.mktemp("s"))


@pytest.mark.parametrize(
    ("ini", "options", "guests"),
    [("module", (), 2), ("test", (), 4), ("test", ("--vm-isolation=session",), 1)],
)
def test_isolation(inside, ini, options, guests):
    (inside.path / "pytest.ini").write_text(f"[pytest]\nvm_isolation = {ini}\n")
    for name in ("one", "two"):
        inside.write(f"test_{name}.py", "def test_a(): pass\n\ndef test_b(): pass\n")
    status, output = inside.run("--in-vm", *options)
    assert status == 0, output
    assert "4 passed" in output
    assert len(inside.guests) == guests


def test_test_timeout(inside):
    (inside.path / "pytest.ini").write_text("[pytest]\nvm_test_timeout = 1.5\n")
    inside.write("test_it.py", "import time\n\ndef test_hangs(): time.sleep(90)\n")
    status, output = inside.run("--in-vm")
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "the test did not end within 1.5 s, and its interpreter was killed" in output


NAMES_ITS_PLUGINS = """
import os

def test_it(pytestconfig):
    assert os.environ["VMSANDBOX_GUEST"]
    for name in ("first", "second", "hypothesispytest"):
        print(name, pytestconfig.pluginmanager.has_plugin(name))
    assert not "shown"
"""


@pytest.mark.parametrize(
    ("ini", "loaded"),
    [
        ("", ["first False", "second False", "hypothesispytest True"]),
        (
            "vm_guest_plugins = first second",
            ["first True", "second True", "hypothesispytest False"],
        ),
    ],
    ids=["nothing", "two"],
)
def test_guest_plugins(inside, ini, loaded):
    """They are loaded there instead of those that are loaded here, as Hypothesis is."""
    (inside.path / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    for name in ("first", "second"):
        inside.write(f"{name}.py", "")
    inside.write("test_it.py", NAMES_ITS_PLUGINS)
    status, output = inside.run("--in-vm", without=())
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "\n".join(loaded) + "\n" in output
