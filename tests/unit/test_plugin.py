"""What markers ask for, where artifacts go, what reports show."""

import pytest
from hypothesis import given, strategies as st

from pytest_vmsandbox.catalogue.catalogue import Catalogue
from pytest_vmsandbox.core.architecture import native_architecture
from pytest_vmsandbox.core.errors import ConfigError
from pytest_vmsandbox.core.spec import HARDWARE_NAMES, Hardware
from pytest_vmsandbox.plugin.artifacts import Artifacts, folder_name
from pytest_vmsandbox.plugin.plan import GuestRequest, applicable, read_marks, reason
from pytest_vmsandbox.plugin.reporting import hide_ours
from support import images

NAMES = ["a-1", "a-2", "b"]


def read(marks):
    return read_marks(marks, Hardware())


def mark(*args, **kwargs):
    return pytest.mark.vm.with_args(*args, **kwargs).mark


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    """A catalogue with some more images than our own."""
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        images.define(folder / name, images.toml(architecture=native_architecture()))
    return Catalogue([folder], cache=folder / "cache")


class TestReadMarks:
    def test_no_marker(self):
        assert read([]) == GuestRequest()

    @pytest.mark.parametrize(
        ("marks", "request_"),
        [
            ([mark("a-1", "b")], GuestRequest(images=("a-1", "b"))),
            ([mark("a-1"), mark("b")], GuestRequest(images=("a-1",))),
            (
                [mark(cpus=2), mark("b", cpus=4)],
                GuestRequest(images=("b",), hardware=Hardware(cpus=2)),
            ),
            (
                [mark(cpus=2), mark(memory="1GiB", cpus=3)],
                GuestRequest(hardware=Hardware(cpus=2, memory=1 << 30)),
            ),
            (
                [mark(isolation="module"), mark(isolation="session")],
                GuestRequest(isolation="module"),
            ),
            (
                [mark(skip={"a-*": "near"}), mark(skip={"a-*": "far", "b": "other"})],
                GuestRequest(skip={"a-*": "near", "b": "other"}),
            ),
            (
                [mark(xfail={"b": "x"}), mark(skip={"b": "y"})],
                GuestRequest(xfail={"b": "x"}, skip={"b": "y"}),
            ),
        ],
    )
    def test_resolves(self, marks, request_):
        assert read(marks) == request_

    def test_the_closest_globs_come_first(self, catalogue):
        asked = read([mark(skip={"a-1": "near"}), mark(skip={"a-*": "far"})])
        assert reason(asked.skip, "a-1", catalogue) == "near"
        assert reason(asked.skip, "a-2", catalogue) == "far"

    @pytest.mark.parametrize(
        "bad",
        [
            mark(3),
            mark(""),
            mark(["a-1"]),
            mark(colour="red"),
            mark(cpus=0),
            mark(isolation="none"),
            mark(isolation=None),
            mark(isolation=[]),
            mark(skip="a"),
            mark(skip=["a"]),
            mark(xfail={"a": None}),
            mark(xfail={1: "a"}),
        ],
    )
    def test_refuses(self, bad):
        with pytest.raises(ConfigError):
            read([bad])

    def test_a_marker_farther_away_is_checked_too(self):
        with pytest.raises(ConfigError, match="colour"):
            read([mark(cpus=1), mark(colour="red")])

    @given(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "cpus": st.integers(1, 4),
                    "network": st.sampled_from(["isolated", "nat"]),
                    "user": st.sampled_from(["root", "me"]),
                },
            ),
            max_size=4,
        )
    )
    def test_each_argument_is_of_the_first_marker_that_has_it(self, settings):
        hardware = read([mark(**setting) for setting in settings]).hardware
        first = {}
        for name in HARDWARE_NAMES:
            if having := [setting[name] for setting in settings if name in setting]:
                first[name] = having[0]
        assert hardware == Hardware().changed(first)


class TestApplicable:
    @pytest.mark.parametrize(
        ("images", "selected", "from_command_line", "result"),
        [
            ((), ["a-1"], False, ["a-1"]),
            ((), ["a-1", "b"], True, ["a-1", "b"]),
            (("a-*",), ["b"], False, []),
            (("a-*",), ["a-2", "b"], True, ["a-2"]),
            (("b",), ["a-1"], False, ["b"]),
            (("b",), ["a-1"], True, []),
            (("b", "a-*"), ["a-1"], False, ["a-1", "b"]),
            (("b", "a-1"), ["a-1"], False, ["a-1", "b"]),
            (("b",), ["b"], False, ["b"]),
            (("b", "b"), ["a-1"], False, ["b"]),
        ],
    )
    def test_table(self, images, selected, from_command_line, result, catalogue):
        request = GuestRequest(images=images)
        assert result == applicable(request, (selected, from_command_line), catalogue)

    @given(
        st.lists(st.sampled_from([*NAMES, "a-*", "*"]), max_size=3),
        st.lists(st.sampled_from(NAMES), unique=True),
        st.booleans(),
    )
    def test_properties(self, catalogue, images, selected, from_command_line):
        request = GuestRequest(images=tuple(images))
        result = applicable(request, (selected, from_command_line), catalogue)
        assert len(result) == len(set(result))
        assert set(result) <= catalogue.fitting(images or ["*"])
        if from_command_line or not images:
            assert set(result) <= set(selected)


def test_reason(catalogue):
    reasons = {"a-1": "one", "a-*": "all"}
    assert reason(reasons, "a-1", catalogue) == "one"
    assert reason(reasons, "a-2", catalogue) == "all"
    assert reason(reasons, "b", catalogue) is None


class TestArtifacts:
    @pytest.mark.parametrize(
        ("nodeid", "name"),
        [
            ("tests/test_a.py::test_b[debian-13]", "tests-test_a.py-test_b-debian-13"),
            ("test_a.py::T::test_b", "test_a.py-T-test_b"),
            ("../up/test_a.py::test", "up-test_a.py-test"),
            ("a b/ü.py::t[\n/x]", "a-b-.py-t-x"),
        ],
    )
    def test_a_folder_has_a_readable_name(self, nodeid, name):
        assert folder_name(nodeid).startswith(name)

    @given(st.text(min_size=1))
    def test_any_id_makes_one_safe_name(self, nodeid):
        name = folder_name(nodeid)
        assert name not in {"", ".", ".."}
        assert "/" not in name
        assert len(name.encode()) < 200

    @given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
    def test_different_tests_have_different_folders(self, one, other):
        assert (folder_name(one) == folder_name(other)) == (one == other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [("t.py::t[a-b]", "t.py::t[a/b]"), ("t.py::t[a]", "t.py::t[a-]"), ("x" * 300, "x" * 301)],
    )
    def test_similar_ids_too(self, one, other):
        assert folder_name(one) != folder_name(other)

    def test_logs_of_runs_that_were_killed_go_and_no_others(self, tmp_path):
        dead = tmp_path / "guests-dead" / "debian-13-1"
        dead.mkdir(parents=True)
        (dead / "console.log").touch()
        (tmp_path / "mine").mkdir()
        one, two = Artifacts(tmp_path), Artifacts(tmp_path)
        logs = [it.of_logs("debian-13-1") for it in (one, two)]
        assert all(it.exists() for it in logs)
        assert {it.name for it in tmp_path.iterdir()} == {"mine", *(it.parent.name for it in logs)}
        for it in (one, two):
            it.close()
        assert [it.name for it in tmp_path.iterdir()] == ["mine"]

    def test_logs_are_somebody_s_before_they_are_there(self, tmp_path):
        owned = []
        artifacts = Artifacts(tmp_path, own=lambda folder: owned.append((folder, folder.exists())))
        logs = artifacts.of_logs("tiny-1").parent
        assert artifacts.of_logs("tiny-2").parent == logs
        assert owned == [(logs, False)]
        artifacts.close()

    def test_folders_are_made_and_discarded(self, tmp_path):
        artifacts = Artifacts(tmp_path / "root")
        assert not (tmp_path / "root").exists()
        folder = artifacts.of_test("t.py::t")
        assert folder.is_dir()
        guest = artifacts.of_guest("t.py::t", "a-1.1")
        assert guest.parent == folder
        (guest / "console.log").touch()
        artifacts.discard("t.py::t")
        artifacts.discard("t.py::other")
        assert list((tmp_path / "root").iterdir()) == []


class TestReporting:
    def raised(self, call):
        try:
            call()
        except ConfigError:
            return pytest.ExceptionInfo.from_current()
        raise AssertionError

    def test_only_lines_of_others_are_left(self):
        excinfo = self.raised(lambda: Hardware().changed({"cpus": 0}))
        assert any("spec.py" in str(entry.path) for entry in excinfo.traceback)
        assert hide_ours(excinfo)
        assert {str(entry.path) for entry in excinfo.traceback} == {__file__}

    def test_a_cause_is_not_shown(self):
        def call():
            try:
                raise KeyError(1)
            except KeyError as error:
                raise ConfigError("x") from error

        excinfo = self.raised(call)
        hide_ours(excinfo)
        assert excinfo.value.__cause__ is None
        assert excinfo.value.__suppress_context__
