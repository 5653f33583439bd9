"""What is invalid is a usage error that names the test and the remedy."""

import pytest


@pytest.mark.parametrize(
    ("marked", "texts"),
    [
        ("'alpah-1'", ["there is no image 'alpah-1'", "did you mean 'alpha-1'"]),
        ("'gamma-*'", ["there is no image 'gamma-*'", "The images are:", "beta"]),
        ("colour='red'", ["no argument 'colour'", "cpus"]),
        ("memory='12'", ["memory='12' is not a size", "512MiB"]),
        ("memory=512", ["memory=512 is not a size", "512MiB"]),
        ("disk='0GiB'", ["disk='0GiB' is not a size"]),
        ("disks='1GiB'", ["disks='1GiB' is not a list", "disks=['1GiB']"]),
        ("disks=['1GiB', '2']", ["'2' is not a size"]),
        ("disks=['1MiB'] * 9", ["9 disks", "at most 8"]),
        ("cpus=0", ["cpus=0", "1 to 255"]),
        ("cpus=True", ["cpus=True", "1 to 255"]),
        ("network='lan'", ["network='lan'", "use 'isolated', 'nat', or a list"]),
        ("user='a b'", ["user='a b'"]),
        ("isolation='none'", ["isolation='none'", "test, module, session"]),
        ("isolation=['test']", ["isolation=['test']", "test, module, session"]),
        ("networks=5", ["networks=5 is not a list of names", "networks=['lan']"]),
        ("networks={'lan': ['a']}", ["is not a list of names", "networks=['lan']"]),
        ("networks=['Lan']", ["'Lan' cannot be the name of a network", "lower-case letters"]),
        ("networks=['lan', 'lan']", ["names a network twice", "each network once"]),
        ("networks=list('abcde')", ["5 networks", "at most 4"]),
        ("skip={'gamma': 'x'}", ["no image 'gamma'"]),
        ("xfail={'gamma-*': 'x'}", ["no image 'gamma-*'"]),
        ("skip='alpha-1'", ["skip='alpha-1'", "skip={"]),
        ("xfail={'alpha-1': 3}", ["xfail={'alpha-1': 3}", "xfail={"]),
        ("3", ["pytest.mark.vm(3)", "'debian-*'"]),
        ("''", ["pytest.mark.vm('')"]),
    ],
)
def test_a_marker(suite, marked, texts):
    suite.write(f"import pytest\n@pytest.mark.vm({marked})\ndef test_x(vm): pass")
    text = suite.usage_error()
    assert "test_suite.py::test_x" in text
    for part in texts:
        assert part in text
    assert suite.guests == []


def test_several_are_reported_together(suite):
    suite.write("""
        import pytest

        @pytest.mark.vm(colour="red")
        def test_a(vm): pass

        @pytest.mark.vm(cpus=0)
        def test_b(vm): pass

        def test_c(vm): pass
    """)
    text = suite.usage_error()
    assert "test_a: pytest.mark.vm has no argument 'colour'" in text
    assert "test_b: cpus=0" in text
    assert "test_c" not in text


def test_a_marker_beside_a_typo_on_the_command_line(suite):
    suite.write("import pytest\n@pytest.mark.vm(colour='red')\ndef test_x(vm): pass")
    text = suite.usage_error("--vm=alpah-1")
    assert "there is no image 'alpah-1'" in text
    assert "test_x: pytest.mark.vm has no argument 'colour'" in text


@pytest.mark.parametrize("option", ["--vm=alpah-1", "--vm=!gamma", "--vm=gamma-*"])
def test_a_typo_on_the_command_line(suite, option):
    suite.write("def test_x(vm): pass")
    text = suite.usage_error(option)
    assert f"there is no image {option.removeprefix('--vm=').lstrip('!')!r}" in text
    assert "The images are:" in text


def test_a_typo_hides_no_test_of_other_images(suite):
    suite.write("import pytest\n@pytest.mark.vm('alpha-1', 'alpah-2')\ndef test_x(vm): pass")
    assert "'alpah-2'" in suite.usage_error()


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ("vm_images = gamma", ["'gamma'"]),
        ("vm_image_path = nowhere", ["nowhere", "vm_image_path"]),
        ("vm_memory = 12", ["vm_memory", "512MiB"]),
        ("vm_cpus = many", ["vm_cpus", "1 to 255"]),
        ("vm_disk = big", ["vm_disk"]),
        ("vm_network = lan", ["vm_network", "isolated"]),
        ("vm_user = a b", ["vm_user"]),
        ("vm_accel = fast", ["vm_accel", "auto, kvm, hvf, tcg"]),
        ("vm_missing = maybe", ["vm_missing", "error, skip"]),
        ("vm_keep = some", ["vm_keep", "none, failed, all"]),
        ("vm_keep_size = much", ["vm_keep_size"]),
        ("vm_boot_timeout = soon", ["vm_boot_timeout", "seconds"]),
        ("vm_boot_timeout = -1", ["vm_boot_timeout", "seconds"]),
        ("vm_boot_timeout = nan", ["vm_boot_timeout", "seconds"]),
        ("vm_command_timeout = 0", ["vm_command_timeout", "seconds"]),
        ("vm_command_timeout = 1e300", ["vm_command_timeout", "at most 86400"]),
        ("vm_offline = maybe", ["vm_offline", "truth value 'maybe'"]),
        ("vm_artifacts_dir = pytest.ini/a/b", ["artifacts cannot be kept in", "pytest.ini/a/b"]),
    ],
)
@pytest.mark.parametrize("quiet", [(), ("-q",)], ids=["", "quiet"])
def test_an_ini_key(bare, line, texts, quiet):
    path = "" if "vm_image_path" in line else "vm_image_path = images\n"
    images = "" if "vm_images" in line else "vm_images = alpha-1\n"
    bare.ini(f"[pytest]\n{path}{images}{line}\n")
    bare.write("def test_x(vm): pass")
    text = bare.usage_error(*quiet)
    for part in texts:
        assert part in text


OPTIONS = [
    "--vm-accel=fast",
    "--vm-missing=maybe",
    "--vm-isolation=none",
    "--vm-boot-timeout=soon",
    "--vm-boot-timeout=0",
    "--vm-boot-timeout=-1",
    "--vm-boot-timeout=",
    "--vm-boot-timeout=86401",
    "--vm-artifacts=",
    "--vm=gamma",
    "--vm=",
]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option(bare, option):
    """It is one in a folder without tests, too."""
    name, _, value = option.partition("=")
    for _ in range(2):
        text = bare.usage_error(option)
        assert value in text
        assert name in text or "there is no image" in text
        bare.write("def test_x(vm): pass")


def test_a_folder_for_artifacts_that_is_a_file(bare):
    bare.write("def test_x(vm): pass")
    assert "artifacts cannot be kept in" in bare.usage_error("--vm-artifacts=pytest.ini")


VALUES = [
    "vm_accel = fast",
    "vm_boot_timeout = -1",
    "vm_command_timeout = 0",
    "vm_cpus = 0",
    "vm_disk = big",
    "vm_env = a b",
    "vm_inside = maybe",
    "vm_isolation = none",
    "vm_memory = 12",
    "vm_missing = maybe",
    "vm_network = lan",
    "vm_offline = maybe",
    "vm_test_timeout = soon",
    "vm_user = a b",
]


def test_a_value_is_wrong_whatever_is_run(bare):
    bare.write("def test_plain(): pass")
    for line in VALUES:
        bare.ini(f"[pytest]\n{line}\n")
        assert line.partition(" ")[0] in bare.usage_error()


def test_help_tells_what_a_guest_loads(bare):
    text = " ".join(bare.run("--help").stdout.str().split())
    assert "the pytest plugins to load for tests inside guests, by module or entry point" in text


def test_an_option_counts_more_than_an_ini_key(bare):
    bare.ini("[pytest]\nvm_image_path = images\nvm_images = alpha-1\nvm_missing = error\n")
    bare.write("def test_x(vm): pass")
    bare.run_apart("--vm-missing=skip").assert_outcomes(skipped=1)


def test_under_xdist_too(suite):
    suite.write("""
        import pytest

        @pytest.mark.vm(colour="red")
        def test_a(vm): pass

        def test_b(): pass
    """)
    result = suite.run_apart("-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "INTERNALERROR" not in result.stdout.str()
    text = result.stderr.str()
    assert text.count("test_a: pytest.mark.vm has no argument 'colour'") == 1


def test_a_suite_without_guests_needs_neither_folders_nor_images(bare):
    bare.ini(
        "[pytest]\nvm_image_path = nowhere\nvm_images = gamma\nvm_artifacts_dir = pytest.ini\n"
    )
    bare.write("def test_x(): pass")
    bare.run().assert_outcomes(passed=1)


def test_a_wrong_vm_option_is_told_once(suite):
    suite.write("""
        def test_a(vm): pass
        def test_b(vm): pass
    """)
    result = suite.run("--vm=no-such")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert (result.stdout.str() + result.stderr.str()).count("no-such") == 1
