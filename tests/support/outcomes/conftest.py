"""What a project's own conftest does: options, ini keys, fixtures, items of its own, order."""

import enum
import pathlib

import pytest

EVENTS = []


class Colour(enum.Enum):
    RED = 1
    GREEN = "g"


class Thing:
    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return isinstance(other, Thing) and self.number == other.number

    __hash__ = None


def pytest_addoption(parser):
    group = parser.getgroup("outcomes")
    group.addoption("--runslow", action="store_true", help="run slow tests")
    group.addoption("--flavour-suffix", default="", help="a value")
    group.addoption("--level", type=int, action="append", default=None, help="some numbers")
    parser.addini("flavour", "a custom key", default="none")
    parser.addini("toppings", "a custom list", type="linelist")
    parser.addini("places", "custom paths", type="paths")
    parser.addini("strictly", "a custom switch", type="bool", default=False)


def pytest_collection_modifyitems(config, items):
    gone = [item for item in items if item.get_closest_marker("never")]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in gone]
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--runslow"):
            item.add_marker(pytest.mark.skip(reason="needs --runslow"))
    items.sort(key=lambda item: "runs_first" not in item.name)


def pytest_assertrepr_compare(config, op, left, right):
    if isinstance(left, Thing) and isinstance(right, Thing) and op == "==":
        return ["Things differ:", f"   {left.number} is not {right.number}"]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and "wants_section" in item.name:
        report.sections.append(("a section of conftest.py", "its text"))
    return report


@pytest.fixture(scope="session")
def of_session():
    EVENTS.append("session up")
    yield len(EVENTS)
    EVENTS.append("session down")
    print("the session's fixture goes")


@pytest.fixture(scope="package")
def of_package(of_session):
    EVENTS.append("package up")
    yield
    EVENTS.append("package down")


@pytest.fixture(scope="module")
def of_module(of_session):
    EVENTS.append("module up")
    yield
    EVENTS.append("module down")


@pytest.fixture(scope="class")
def of_class(of_module):
    EVENTS.append("class up")
    yield
    EVENTS.append("class down")


@pytest.fixture
def order(of_class, record_property):
    """Tells what has happened so far."""
    EVENTS.append("function up")
    yield EVENTS
    EVENTS.append("function down")
    record_property("order", "; ".join(EVENTS))
    EVENTS.clear()


@pytest.fixture(scope="session", params=["one", "two"])
def per_session(request):
    EVENTS.append(f"{request.param} up")
    yield request.param
    EVENTS.append(f"{request.param} down")


@pytest.fixture
def where():
    return "the root"


def pytest_collect_file(parent, file_path):
    if file_path.suffix == ".sums":
        return SumsFile.from_parent(parent, path=file_path)
    return None


class SumsFile(pytest.File):
    def collect(self):
        for number, line in enumerate(pathlib.Path(self.path).read_text().splitlines()):
            name, _, sum_ = line.partition(": ")
            yield SumItem.from_parent(self, name=name, sum=sum_, line=number)


class WrongSum(Exception):
    pass


class SumItem(pytest.Item):
    def __init__(self, *, sum, line, **kwargs):
        super().__init__(**kwargs)
        self.sum, self.line = sum, line
        self.add_marker("sums")

    def runtest(self):
        left, _, right = self.sum.partition(" = ")
        if left == "skip":
            pytest.skip("a sum to skip")
        if eval(left) != int(right):
            raise WrongSum(left, right)

    def repr_failure(self, excinfo):
        if isinstance(excinfo.value, WrongSum):
            return "the sum is wrong:\n  {} is not {}".format(*excinfo.value.args)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, self.line, f"sum: {self.name}"
