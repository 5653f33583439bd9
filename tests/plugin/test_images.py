"""Which images a test runs on, and what its id says."""

import pytest

PLAIN = "def test_x(vm): pass"


@pytest.mark.parametrize(
    ("args", "images"),
    [
        ([], ["alpha-1"]),
        (["--vm=beta"], ["beta"]),
        (["--vm=beta", "--vm=alpha-2"], ["alpha-2", "beta"]),
        (["--vm=alpha-*"], ["alpha-1", "alpha-2"]),
        (["--vm=alpha-*", "--vm=!alpha-1"], ["alpha-2"]),
        (["--vm=foreign"], ["foreign"]),
    ],
)
def test_the_command_line_selects(suite, args, images):
    suite.write(PLAIN)
    assert suite.ids("-k", "test_x", *args) == [f"test_x[{name}]" for name in images]


def test_all_is_what_this_machine_runs_natively(suite):
    suite.write(PLAIN)
    ids = suite.ids("--vm=all")
    assert {"test_x[alpha-1]", "test_x[alpha-2]", "test_x[beta]"} <= set(ids)
    assert "test_x[foreign]" not in ids
    assert set(ids) - set(suite.ids("--vm=!beta")) == {"test_x[beta]"}


def test_an_ini_key_selects_where_no_option_does(suite):
    suite.write(PLAIN)
    suite.ini("[pytest]\nvm_image_path = images\nvm_images = alpha-* !alpha-1\n")
    assert suite.ids() == ["test_x[alpha-2]"]
    assert suite.ids("--vm=beta") == ["test_x[beta]"]


def test_the_default_is_debian_13(suite):
    suite.write(PLAIN)
    suite.ini("[pytest]\n")
    assert suite.ids() == ["test_x[debian-13]"]


@pytest.mark.parametrize(
    ("marked", "args", "images"),
    [
        ("'alpha-*'", [], ["alpha-1"]),
        ("'alpha-*'", ["--vm=all"], ["alpha-1", "alpha-2"]),
        ("'all'", [], ["alpha-1"]),
        ("'beta'", [], ["beta"]),
        ("'beta', 'alpha-*'", [], ["alpha-1", "beta"]),
        ("'beta', 'alpha-1'", [], ["alpha-1", "beta"]),
        ("'beta'", ["--vm=beta", "--vm=alpha-1"], ["beta"]),
        ("'beta'", ["--vm=alpha-1"], []),
        ("'alpha-*'", ["--vm=beta"], []),
        ("'b*'", [], []),
        ("cpus=2", ["--vm=alpha-*"], ["alpha-1", "alpha-2"]),
    ],
)
def test_a_marker_filters_and_a_name_in_it_also_adds(suite, marked, args, images):
    suite.write(f"import pytest\n@pytest.mark.vm({marked})\n{PLAIN}")
    assert suite.ids(*args) == [f"test_x[{name}]" for name in images]


def test_the_image_is_the_first_part_of_an_id(suite):
    suite.write("""
        import pytest

        @pytest.mark.parametrize("letter", "ab")
        @pytest.mark.parametrize("number", [1, 2])
        def test_x(letter, vm, number):
            pass

        @pytest.fixture(params=["p"])
        def mine(request):
            return request.param

        def test_y(mine, vm):
            pass
    """)
    assert suite.ids() == [
        "test_x[alpha-1-1-a]",
        "test_x[alpha-1-1-b]",
        "test_x[alpha-1-2-a]",
        "test_x[alpha-1-2-b]",
        "test_y[alpha-1-p]",
    ]


def test_a_test_is_called_by_its_id(suite):
    suite.write(PLAIN)
    result = suite.run("test_suite.py::test_x[beta]", "--vm=all")
    result.assert_outcomes(passed=1)
    assert suite.guests[0] == "boot beta-1"


def test_tests_of_an_image_run_one_after_the_other(suite):
    suite.write("def test_a(vm): pass\ndef test_b(vm): pass")
    assert suite.ids("--vm=alpha-*") == [
        "test_a[alpha-1]",
        "test_b[alpha-1]",
        "test_a[alpha-2]",
        "test_b[alpha-2]",
    ]


def test_a_test_without_an_image_is_deselected_and_counted(suite):
    suite.write("""
        import pytest

        def test_plain():
            pass

        @pytest.mark.vm("beta")
        @pytest.mark.parametrize("number", [1, 2])
        def test_elsewhere(vm, number):
            pass

        def test_here(vm):
            pass
    """)
    result = suite.run("--vm=alpha-1")
    result.assert_outcomes(passed=2, deselected=2)
    assert "no-image" not in result.stdout.str()
    collected = suite.run("--vm=alpha-1", "--co", "-q")
    collected.stdout.fnmatch_lines(["2/4 tests collected (2 deselected)*"])
    shared = suite.run_apart("--vm=alpha-1", "-n1")  # xdist itself does not count them
    told = "vmsandbox: deselected 2 tests to which no selected image applies"
    assert shared.outlines.count(told) == 1


def test_an_empty_selection_is_told(suite):
    suite.write("def test_plain(): pass\ndef test_x(vm): pass")
    result = suite.run("--vm=all", "--vm=!*_*")
    result.assert_outcomes(passed=1, deselected=1)
    told = "vmsandbox: deselected 1 tests, because --vm=all --vm=!*_* selects no image"
    assert result.outlines.count(told) == 1
    assert "selects no image" not in suite.run("--vm=alpha-1", "--co").stdout.str()


def test_other_tests_keep_their_ids(suite):
    suite.write("def test_x(vm_factory): pass\ndef test_y(vm_artifacts): pass")
    assert suite.ids("--vm=all") == ["test_x", "test_y"]


def test_a_vm_that_is_asked_for_late_is_of_the_first_image(suite):
    suite.write("def test_x(request): assert request.getfixturevalue('vm').image == 'alpha-1'")
    suite.run("--vm=alpha-*").assert_outcomes(passed=1)


def test_collecting_boots_nothing(suite):
    suite.write(PLAIN)
    result = suite.run("--collect-only")
    assert "a fake runs" not in result.stdout.str()
    assert suite.guests == []


def test_what_runs_guests_is_told_before_the_first_test(suite):
    suite.write(PLAIN)
    lines = suite.run("--vm=alpha-*").outlines
    assert lines.index("vmsandbox: a fake runs alpha-2") < lines.index("") < len(lines)


def test_a_hook_adds_images(bare):
    bare.ini("[pytest]\nvm_images = beta\n")
    bare.pytester.makeconftest("""
        import pathlib

        def pytest_vmsandbox_images(config):
            return [pathlib.Path(__file__).with_name("images")]
    """)
    bare.write(PLAIN)
    assert bare.ids() == ["test_x[beta]"]


def with_hook(bare, returned):
    """Let a hook name the images, and nothing else."""
    bare.ini("[pytest]\nvm_images = beta\n")
    bare.pytester.makeconftest(f"""
        import pathlib

        def pytest_vmsandbox_images(config):
            with (config.rootpath / "calls").open("a") as calls:
                print("called", file=calls)
            return {returned}
    """)
    bare.write(PLAIN)


def test_a_hook_may_return_relative_paths_and_is_called_once(bare):
    with_hook(bare, "['images']")
    bare.run("--vm-missing=skip").assert_outcomes(skipped=1)
    assert (bare.path / "calls").read_text() == "called\n"


def test_a_hook_counts_in_workers(bare):
    with_hook(bare, "['images']")
    result = bare.run_apart("-n2", "--vm-missing=skip")
    result.assert_outcomes(skipped=1)


@pytest.mark.parametrize("returned", ["'images'", "pathlib.Path('images')", "3"])
def test_a_hook_that_returns_no_list(bare, returned):
    with_hook(bare, returned)
    text = bare.usage_error()
    assert "pytest_vmsandbox_images returned " in text
    assert "Remedy: return a list" in text


class TestList:
    def test_names_states_and_sizes(self, bare):
        bare.write(PLAIN)
        result = bare.run("--vm-list")
        assert result.ret == 0
        result.stdout.re_match_lines(["alpha-1 +missing +- +An image", "beta +missing.*"])
        assert "test session starts" not in result.stdout.str()
        assert self.left_out(result) > 0
        assert "foreign" not in result.stdout.str()

    @staticmethod
    def left_out(result) -> int:
        """How many images for other architectures are only counted."""
        [line] = [line for line in result.outlines if " for other architectures: " in line]
        return int(line.split(" more image")[0])

    def test_has_the_selected_image_of_another_architecture(self, bare):
        result = bare.run("--vm-list", "--vm=foreign")
        result.stdout.re_match_lines(["alpha-1 +missing +- +An image", "foreign +missing.*"])
        assert self.left_out(result) == self.left_out(bare.run("--vm-list")) - 1

    def test_knows_the_images_of_hooks(self, bare):
        bare.ini("[pytest]\n")
        bare.pytester.makeconftest("""
            import pathlib

            def pytest_vmsandbox_images(config):
                return [pathlib.Path(__file__).with_name("images")]
        """)
        result = bare.run("--vm-list")
        assert result.ret == 0
        assert "beta" in result.stdout.str()

    def test_a_bad_definition_is_a_usage_error(self, bare):
        (bare.path / "images" / "beta" / "image.toml").write_text("schema = 9")
        result = bare.run("--vm-list")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*image.toml: schema = 9 is not allowed*"])
        result.stdout.re_match_lines(["alpha-2 +missing +-", "beta +invalid +-"])
