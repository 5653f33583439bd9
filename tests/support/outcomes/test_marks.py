import sys

import pytest


def test_passes():
    pass


@pytest.mark.never
def test_never():
    pass


def test_runs_first(record_property):
    record_property("first", True)


@pytest.mark.skip
def test_skip():
    raise AssertionError


@pytest.mark.skip(reason="because\nof two lines")
def test_skip_reason():
    raise AssertionError


@pytest.mark.skipif(sys.platform == "linux", reason="not on Linux")
def test_skipif():
    raise AssertionError


@pytest.mark.skipif("sys.platform == 'linux'", reason="a text to evaluate")
def test_skipif_text():
    raise AssertionError


@pytest.mark.skipif("no_such_name", reason="?")
def test_skipif_is_wrong():
    pass


def test_skip_inside():
    print("before")
    pytest.skip("inside")


def test_importorskip():
    pytest.importorskip("no_such_module_anywhere")


@pytest.fixture
def skips():
    pytest.skip("in a fixture")


def test_fixture_skips(skips):
    pass


def test_teardown_skips(request):
    request.addfinalizer(lambda: pytest.skip("in teardown"))


@pytest.mark.xfail
def test_xfail():
    raise AssertionError("as expected")


@pytest.mark.xfail(reason="known")
def test_xpass():
    pass


@pytest.mark.xfail(strict=True, reason="it should")
def test_xpass_strict():
    pass


@pytest.mark.xfail(raises=ValueError, reason="only that")
def test_xfail_raises():
    raise ValueError("that")


@pytest.mark.xfail(raises=ValueError)
def test_xfail_raises_another():
    raise TypeError("not that")


@pytest.mark.xfail(run=False, reason="would hang")
def test_xfail_not_run():
    sys.exit(3)


@pytest.mark.xfail(False, reason="not now")
def test_xfail_condition():
    assert 0


def test_xfail_inside():
    pytest.xfail("inside")


@pytest.mark.xfail
def test_xfail_in_setup(there_is_no_such_fixture):
    pass


def test_fail_inside():
    pytest.fail("inside")


def test_fail_without_trace():
    pytest.fail("no trace", pytrace=False)


def test_system_exit():
    sys.exit(3)


@pytest.mark.slow
def test_slow(pytestconfig):
    assert pytestconfig.getoption("--runslow")


@pytest.mark.level(3)
def test_level(request):
    assert request.node.get_closest_marker("level").args == (3,)


def test_options(pytestconfig, record_property):
    for name in ("flavour", "toppings", "strictly"):
        record_property(name, repr(pytestconfig.getini(name)))
    record_property("places", [p.name for p in pytestconfig.getini("places")])
    for name in ("flavour_suffix", "level", "runslow", "verbose", "tbstyle", "showlocals"):
        record_property(name, repr(pytestconfig.getoption(name)))


def test_add_marker(request):
    request.node.add_marker(pytest.mark.xfail(reason="added inside"))
    request.node.add_marker("dynamic")
    request.applymarker(pytest.mark.dynamic)
    raise AssertionError


@pytest.fixture
def expects():
    yield


@pytest.fixture
def marks(request):
    request.applymarker(pytest.mark.xfail(reason="added by a fixture"))


def test_fixture_marks(marks):
    raise AssertionError


def test_wants_section():
    pass


def test_returns():
    return 3


async def test_coroutine():
    pass
