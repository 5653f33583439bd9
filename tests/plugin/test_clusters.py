"""The marker and the fixture `vm_cluster`. The guests are fakes."""

import pytest

TWO = "{'db1': 'alpha-1', 'db2': {'image': 'beta', 'memory': '1GiB'}}"


@pytest.mark.parametrize(
    ("marked", "texts"),
    [
        ("", ["needs machines= once", "write @pytest.mark.vm_cluster({'db1'"]),
        ("{}", ["a cluster needs a machine", "machines={'db1'"]),
        ("['alpha-1']", ["machines=['alpha-1'] does not map names to machines", "machines={'db1'"]),
        ("{'db1': 'alpha-1'}, machines={}", ["needs machines= once"]),
        ("{'db1': 'alpha-1'}, {}, 5", ["does not take 5", "networks={…}"]),
        ("{'db1': 'alpha-1'}, {}, networks={}", ["needs networks= once"]),
        ("{'db1': 'alpha-1'}, {'lan': ['db2']}", ["the network 'lan': there is no machine 'db2'"]),
        ("{'db1': {'imag': 'alpha-1'}}", ["no hardware called 'imag'", "name the image, 'image':"]),
        ("{'db1': 'alpha-1'}, memory='1GiB'", ["does not take 'memory'"]),
        ("{'db_1': 'alpha-1'}", ["'db_1' cannot be the name of a machine", "lower-case letters"]),
        ("{'10': 'alpha-1'}", ["'10' cannot be the name of a machine", "with a letter"]),
        ("{'localhost': 'alpha-1'}", ["'localhost' cannot be the name"]),
        ("{'db1': None}", ["the machine 'db1' has no image", "vmsandbox images list"]),
        ("{'db1': {'memory': '1GiB'}}", ["the machine 'db1' has no image"]),
        ("{'db1': 3}", ["the machine 'db1': 3 is no image"]),
        ("{'db1': 'alpah-1'}", ["the machine 'db1': there is no image 'alpah-1'", "did you mean"]),
        ("{'db1': 'alpha-*'}", ["'alpha-*' may stand for several images", "parametrize a fixture"]),
        ("{'db1': {'image': 'beta', 'memory': 1}}", ["the machine 'db1': memory=1 is not a size"]),
        ("{'db1': {'image': 'beta', 'colour': 1}}", ["the machine 'db1': there is no hardware"]),
        ("{'db1': 'beta'}, networks=['db1']", ["networks=['db1'] does not map names to networks"]),
        ("{'db1': 'beta'}, networks={'a b': ['db1']}", ["'a b' cannot be the name of a network"]),
        ("{'db1': 'beta'}, networks={'lan': 'db1'}", ["network 'lan': 'db1' is not a list"]),
        ("{'db1': 'beta'}, networks={'lan': ['db2']}", ["there is no machine 'db2'", "one of db1"]),
        (
            "{'db1': 'beta'}, networks={'lan': []}",
            ["the network 'lan' has no machine", "or leave out the network"],
        ),
        (
            "{'db1': 'beta'}, networks={'lan': ['db1'] * 2}",
            ["'lan' names a machine twice", "name each of its machines once"],
        ),
        ("{'db1': 'beta'}, networks={'lan': [['db1']]}", ["there is no machine ['db1']"]),
        (
            "{'db1': 'beta'}, networks={'l' * 40: ['db1']}",
            ["cannot be the name of a network", "31"],
        ),
        (
            "{'db1': 'beta'}, networks={'lan': {'ipv4': '10.9.0.0/99'}}",
            ["'lan': ipv4='10.9.0.0/99'"],
        ),
        (
            "{'db1': 'beta'}, networks={'lan': {'ipv4': '10.9.0.0/30'}}",
            ["'lan': 10.9.0.0/30 is too"],
        ),
        (
            "{'db1': 'beta'}, networks={'lan': {'ipv6': '10.9.0.0/24'}}",
            ["'lan': ipv6='10.9.0.0/24'"],
        ),
        ("{'db1': 'beta'}, networks={'lan': {'addresses': 'dhpc'}}", ["'lan': addresses='dhpc'"]),
        ("{'db1': 'beta'}, networks={'lan': {'seed': 'x'}}", ["'lan': seed='x' is not a whole"]),
        ("{'db1': 'beta'}, inside=['db1']", ["inside=['db1']: there is no such machine"]),
        ("{'db1': 'beta'}, form=lambda: None", ["with a cluster alone", "takes one argument"]),
        ("{'db1': 'beta'}, form=lambda a, b: None", ["with a cluster alone: missing", "'b'"]),
        ("{'db1': 'beta'}, form=print, depends_on='x'", ["form=: depends_on='x' is not a list"]),
        ("{'db1': 'beta'}, form=print, depends_on=[3]", ["form=: depends_on has 3, which is"]),
        ("{'db1': 'beta'}, networks={'lan': {'ipv5': 1}}", ["'lan' has no setting 'ipv5'", "ipv4"]),
    ],
)
def test_a_marker_that_is_wrong(suite, marked, texts):
    suite.write(f"import pytest\n@pytest.mark.vm_cluster({marked})\ndef test_x(vm_cluster): pass")
    text = suite.usage_error()
    assert "test_suite.py::test_x: " in text
    assert "Remedy: " in text
    for part in texts:
        assert part in text
    assert suite.guests == []


@pytest.mark.parametrize(
    ("marked", "text"),
    [
        ("isolation='modul'", "isolation='modul' is unknown"),
        ("memory='nonsense'", "memory='nonsense'"),
        ("colour=1", "pytest.mark.vm has no argument 'colour'"),
        ("'alpah-1'", "there is no image 'alpah-1'"),
    ],
)
@pytest.mark.parametrize("fixture", ["vm_cluster", ""])
def test_the_marker_vm_that_is_wrong(suite, marked, text, fixture):
    """On tests that drive a cluster, and on those inside one machine."""
    suite.write(f"""
        import pytest

        @pytest.mark.vm({marked})
        @pytest.mark.vm_cluster({TWO}, inside="db1")
        def test_x({fixture}): pass
    """)
    told = suite.usage_error("--in-vm")
    assert "test_suite.py::test_x: " in told
    assert text in told
    assert "Remedy: " in told


def test_the_marker_vm_that_has_no_effect(suite):
    suite.write("""
        import pytest

        pytestmark = pytest.mark.vm_cluster({"one": "alpha-1"})

        @pytest.mark.vm(cpus=2, networks=["x"])
        def test_a(vm_cluster): pass

        @pytest.mark.vm("alpha-2", isolation="module", skip={"alpha-1": "slow"})
        def test_b(vm_cluster): pass

        @pytest.mark.vm(isolation="module")
        def test_c(vm_cluster): pass

        @pytest.mark.vm("alpha-2", cpus=2)
        def test_d(vm, vm_cluster): pass

        @pytest.mark.vm(isolation="test")
        def test_e(vm_cluster): pass
    """)
    result = suite.run("-p", "no:randomly")
    result.assert_outcomes(passed=5)
    test = "in the marker vm of test_suite.py::test_"
    says = "no effect: the marker vm_cluster says what its machines have"
    assert [line for line in result.outlines if "no effect" in line] == [
        f"vmsandbox: hardware and networks {test}a have {says}",
        f"vmsandbox: images, isolation, reasons to skip and xfail {test}b have {says}",
        f"vmsandbox: isolation {test}c has {says}",
    ]


def test_without_a_marker(suite):
    suite.write("def test_x(vm_cluster): pass")
    assert "needs the marker vm_cluster" in suite.usage_error()


def test_not_inside(suite):
    suite.write(f"""
        import pytest

        @pytest.mark.in_vm
        @pytest.mark.vm_cluster({TWO})
        def test_x(vm_cluster): pass
    """)
    text = suite.usage_error()
    assert (
        "cannot drive a guest: it has the marker in_vm, and asks for the fixture vm_cluster" in text
    )
    assert "With inside= in the marker vm_cluster, a test runs inside one machine" in text


@pytest.mark.parametrize(
    ("more", "args", "texts"),
    [
        ("", (), ["does not say in which one of db1, db2", "add inside='db1'", "the marker in_vm"]),
        (", inside=['db1']", (), ["inside=['db1']: there is no such machine", "use one of db1"]),
        (", inside='db3'", (), ["inside='db3': there is no such machine", "use one of db1, db2"]),
        (", inside='db1', form=3", (), ["form=3 cannot be called", "takes a cluster"]),
        (", inside='db1', depends_on=[]", (), ["there is no form=", "leave out depends_on="]),
        (", inside='db1'", ("--vm-record",), ["--vm-record records one guest", "deselect such"]),
    ],
)
def test_inside_one_machine_that_is_wrong(suite, more, args, texts):
    suite.write(f"""
        import pytest

        @pytest.mark.in_vm
        @pytest.mark.vm_cluster({TWO}{more})
        def test_x(): pass
    """)
    text = suite.usage_error(*args)
    assert "test_suite.py::test_x" in text
    for part in ["Remedy: ", *texts]:
        assert part in text


def test_inside_a_machine_that_cannot_be(suite):
    suite.write("""
        import pytest

        @pytest.mark.vm_cluster({"db1": "alpha-1", "db2": "gamma"}, inside="db1")
        def test_x(): pass
    """)
    assert "the machine 'db2': there is no image 'gamma'" in suite.usage_error("--in-vm")


def test_formed_once(suite):
    suite.write("""
        import pytest

        def form(cluster): pass

        @pytest.mark.vm_cluster({"one": "alpha-1"}, inside="one", form=form, depends_on=["etcd 3"])
        def test_x(vm_cluster):
            assert [*vm_cluster] == ["one"]
    """)
    suite.run().assert_outcomes(passed=1)
    assert suite.guests == ["form form etcd 3", "cluster", "boot one-1", "end one-1"]


def test_each_test_has_its_own(suite):
    suite.write(f"""
        import pytest

        pytestmark = pytest.mark.vm_cluster({TWO})

        def test_a(vm_cluster):
            assert [*vm_cluster] == ["db1", "db2"]
            assert vm_cluster["db2"].image == "beta"

        def test_b(vm_cluster): pass

        @pytest.mark.vm_cluster({{"one": "alpha-2"}}, networks={{}})
        def test_c(vm_cluster): pass
    """)
    suite.run("-p", "no:randomly", "--vm=alpha-2").assert_outcomes(passed=3)  # whatever --vm says
    assert suite.guests == [
        *("cluster", "boot db1-1", "boot db2-2 memory=1GiB", "end db2-2", "end db1-1"),
        *("cluster", "boot db1-3", "boot db2-4 memory=1GiB", "end db2-4", "end db1-3"),
        *("cluster networks={}", "boot one-5", "end one-5"),
    ]
    assert suite.ids() == ["test_a", "test_b", "test_c"]


def test_the_header_and_what_is_armed(suite):
    suite.write(f"""
        import pytest

        @pytest.mark.vm_cluster({TWO})
        def test_a(vm_cluster): pass

        @pytest.mark.skip
        @pytest.mark.vm_cluster({{"one": "alpha-2"}})
        def test_b(vm_cluster): pass
    """)
    result = suite.run()
    assert [line for line in result.outlines if "a fake runs" in line] == [
        "vmsandbox: a fake runs alpha-1",
        "vmsandbox: a fake runs beta",
    ]


def test_a_failed_test_keeps_all_machines(suite):
    suite.write(f"""
        import pytest

        @pytest.mark.vm_cluster({TWO})
        def test_a(vm_cluster):
            vm_cluster["db2"].fault("slow")
            assert 0
    """)
    result = suite.run("--vm-keep=failed", "--vm-artifacts=kept")
    result.assert_outcomes(failed=1)
    assert [line for line in suite.guests if not line.startswith(("cluster", "boot", "end"))] == [
        "restore db2-2 slow",
        "keep db1-1 1 call assert 0",
        "keep db2-2 2 call assert 0",
    ]
    (folder,) = (suite.path / "kept").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["db1-1", "db2-2"]
    shown = result.stdout.str()
    assert "fault in db2-2: slow" in shown
    for name in ("db1-1", "db2-2"):
        assert f"vmsandbox enter test_suite.py::test_a --guest {name}" in shown
        assert (folder / name / "screenshot.png").exists()
        assert (folder / name / "processes.txt").exists()
