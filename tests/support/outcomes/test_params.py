import pytest
from conftest import Colour

ODD = ["a b", "ümlaut", "日本", "a/b::c[d]", "", "x" * 300, "new\nline", "\x1b", "-", "\udcff"]


@pytest.mark.parametrize("value", ODD)
def test_texts(value):
    assert value == ODD[0]


@pytest.mark.parametrize(
    "value", [None, True, 1.5, 1e100, float("nan"), -0.0, Colour.RED, Colour.GREEN, b"\xff", 3 + 4j,
              (1, 2), {"a": 1}, lambda: 0, int, pytest.param(1, id="named"), test_texts]
)  # fmt: skip
def test_values(value, record_property):
    record_property("value", type(value).__name__)


@pytest.mark.parametrize("right", [1, 2])
@pytest.mark.parametrize(("left", "middle"), [(1, "a"), (2, "b")], ids=["L1", "L2"])
def test_stacked(left, middle, right):
    assert left == right


@pytest.mark.parametrize("value", [1, 2, 1], ids=["same", "same", "same"])
def test_same_ids(value):
    assert value == 1


@pytest.fixture
def doubled(request):
    return 2 * request.param


@pytest.mark.parametrize("doubled", [1, 2], indirect=True)
def test_indirect(doubled):
    assert doubled == 2


@pytest.mark.parametrize("value", [1, 2], scope="module")
def test_module_scope_a(value):
    pass


@pytest.mark.parametrize("value", [1, 2], scope="module")
def test_module_scope_b(value):
    pass


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(1, marks=pytest.mark.skip(reason="one is skipped")),
        pytest.param(2, marks=pytest.mark.xfail(reason="two fails", strict=True)),
        pytest.param(3, marks=[pytest.mark.slow]),
        4,
    ],
)
def test_marked(value):
    assert value != 2


@pytest.mark.parametrize("value", [])
def test_no_values(value):
    pass


def pytest_generate_tests(metafunc):
    if "generated" in metafunc.fixturenames:
        metafunc.parametrize("generated", [f"g{n}" for n in range(2)])


def test_generated(generated):
    assert generated == "g0"


def test_per_session_2(order, per_session):
    pass


@pytest.mark.parametrize("value", [1, 2])
class TestAClass:
    @pytest.mark.parametrize("more", "ab")
    def test_it(self, value, more):
        assert (value, more) != (2, "b")

    class TestNested:
        def test_it(self, value):
            pass
