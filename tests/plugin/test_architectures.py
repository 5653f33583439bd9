"""Images for several architectures in a run of pytest, on a machine with a faked name."""

import platform

import pytest

from support import images

PLAIN = "def test_x(vm): pass"


@pytest.fixture
def machine(monkeypatch):
    """Fake the name of this machine's architecture."""

    def machine(name):
        monkeypatch.setattr(platform, "machine", lambda: name)

    machine("x86_64")
    return machine


@pytest.fixture
def several(suite, machine):
    """A suite with the images deb-1 and deb-2, which are for several architectures each."""
    text = images.toml(requires='["sh"]').replace(
        'architecture = "x86_64"', 'architectures = ["x86_64", "aarch64", "riscv64"]'
    )
    for name in ("deb-1", "deb-2"):
        images.define(suite.path / "images" / name, text)
    suite.ini("[pytest]\nvm_image_path = images\nvm_images = deb-1\n")
    return suite


@pytest.mark.parametrize(
    ("args", "selected"),
    [
        ("", "deb-1"),
        ("--vm=deb-*", "deb-1 deb-2"),
        ("--vm=deb-1_arm64", "deb-1_arm64"),
        ("--vm=deb-1_amd64 --vm=deb-1", "deb-1"),
        ("--vm=deb-*_arm64", "deb-1_arm64 deb-2_arm64"),
        ("--vm=deb-*_* --vm=!*_riscv64 --vm=!deb-2", "deb-1 deb-1_arm64 deb-2_arm64"),
    ],
)
def test_selection(several, args, selected):
    several.write(PLAIN)
    assert several.ids(*args.split()) == [f"test_x[{name}]" for name in selected.split()]


HINT = "vmsandbox: {!r} in -k is in no test's name. Images are selected by --vm, such as --vm={}"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("arm64", HINT.format("arm64", "deb-1_arm64")),
        ("test_x and AARCH64", HINT.format("aarch64", "deb-1_arm64")),
        ("deb-2_riscv64", HINT.format("deb-2_riscv64", "deb-2_riscv64")),
        ("deb-2", HINT.format("deb-2", "deb-2")),
        ("amd64", HINT.format("amd64", "deb-1")),  # the one that is selected
        ("s390x", HINT.format("s390x", "{}_s390x")),  # of our own images
        ("typo", ""),
        ("not deb-1", ""),
        ("not (test_x or arm64)", ""),
        ("deb-1 and typo", ""),  # it is in the names
    ],
)
def test_words_that_would_select_images(several, words, hint):
    several.write(PLAIN)
    result = several.run("-k", words)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    told = [line for line in result.stdout.lines if line.startswith("vmsandbox: ")]
    start, _, end = hint.partition("{}")
    assert [line.startswith(start) and line.endswith(end) for line in told] == [True] * bool(hint)


def test_words_that_are_found_or_have_nothing_to_do_with_images(several):
    several.write("def test_arm64(vm): pass\ndef test_y(vm): pass")
    assert several.ids("-k", "arm64") == ["test_arm64[deb-1]"]
    assert "vmsandbox: " not in several.run("-k", "arm64 and test_y").stdout.str()
    several.write("def test_plain(): pass")
    assert "vmsandbox: " not in several.run("-k", "arm64").stdout.str()


def test_where_tests_can_run_inside_instead(several):
    """It is an image of the same architecture: who tests on arm64 wants no other one."""
    several.write("import pytest\n\n@pytest.mark.in_vm\ndef test_x(): pass")
    result = several.run("--vm=deb-1_arm64")
    result.assert_outcomes(errors=1)
    text = result.stdout.str()
    assert "tests cannot run inside deb-1_arm64: this image has no Python" in text
    names = text.split("run them inside ")[1].split(". Tests that")[0].split(" or ")
    assert all(name.endswith("_arm64") for name in names), names


def test_on_a_machine_with_the_faked_name_arm64(several, machine):
    several.write(PLAIN)
    machine("aarch64")
    assert several.ids("--vm=deb-1", "--vm=deb-1_arm64", "--vm=deb-2_amd64") == [
        "test_x[deb-1]",
        "test_x[deb-2_amd64]",
    ]


def test_markers(several):
    several.write("""
        import pytest

        @pytest.mark.vm("deb-*")
        def test_glob(vm): pass

        @pytest.mark.vm("deb-2_riscv64")
        def test_name(vm): pass

        @pytest.mark.vm("deb-1_amd64")
        def test_longer(vm): pass

        @pytest.mark.vm("*_arm64")
        def test_architecture(vm): pass
    """)
    assert several.ids() == [
        *("test_glob[deb-1]", "test_longer[deb-1]", "test_name[deb-2_riscv64]"),
    ]
    assert several.ids("--vm=deb-1_arm64") == [
        *("test_glob[deb-1_arm64]", "test_architecture[deb-1_arm64]"),
    ]


def test_reasons(several):
    several.write("""
        import pytest

        @pytest.mark.vm(skip={"deb-1": "one", "deb-2_amd64": "two", "*_riscv64": "three", "*-2": "four"})
        def test_x(vm): pass
    """)
    result = several.run("-rs", "--vm=deb-*_*")
    said = result.stdout.str()
    result.assert_outcomes(passed=1, skipped=5)
    for reason, count in {"one": 1, "two": 1, "three": 2, "four": 1}.items():
        assert f"[{count}] test_suite.py" in said
        assert said.count(f": {reason}\n") == 1


def test_an_id_with_the_longer_name(several):
    several.write(PLAIN)
    said = several.usage_error("test_suite.py::test_x[deb-1_amd64]")
    assert "test_suite.py::test_x[deb-1_amd64] names the image deb-1 by a longer name" in said
    assert "Remedy: use test_suite.py::test_x[deb-1]" in said
    said = several.usage_error("test_suite.py::test_x[deb-1_arm64]")
    assert (
        "names the image deb-1_arm64, which is not selected\nRemedy: add --vm=deb-1_arm64" in said
    )


def test_a_typo(several):
    several.write(PLAIN)
    assert "did you mean 'deb-1_arm64'?" in several.usage_error("--vm=deb-1_aarch64")
