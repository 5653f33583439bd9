import logging
import warnings

import pytest

log = logging.getLogger("outcomes.test")


def test_levels():
    log.debug("debug")
    log.info("info")
    log.warning("warning %d", 1)
    log.error("error")
    assert 0


def test_caplog(caplog):
    with caplog.at_level(logging.DEBUG):
        log.debug("seen")
    log.info("and this")
    assert [it.getMessage() for it in caplog.records] == ["seen", "and this"]


@pytest.fixture
def logs():
    log.warning("in setup")
    yield
    log.warning("in teardown")


def test_phases(logs):
    log.warning("in call")
    assert 0


def test_exception():
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        log.exception("caught")
    raise AssertionError


def test_warning():
    warnings.warn("a user's warning", stacklevel=1)


def test_warning_of_two_lines():
    warnings.warn("one\ntwo", UserWarning, stacklevel=1)


class OwnWarning(Warning):
    pass


def test_own_warning():
    warnings.warn(OwnWarning("of the suite's own"), stacklevel=1)


@pytest.mark.filterwarnings("error")
def test_warning_is_error():
    warnings.warn("raised", DeprecationWarning, stacklevel=1)


def test_warning_is_ignored():
    warnings.warn("ignored by the ini file", stacklevel=1)


def test_deprecation():
    warnings.warn("going away", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("number", range(3))
def test_the_same_warning(number):
    warnings.warn("the same", stacklevel=1)


def test_recwarn(recwarn):
    warnings.warn("recorded", stacklevel=1)
    assert len(recwarn) == 1


def test_warns():
    with pytest.warns(UserWarning):
        pass
