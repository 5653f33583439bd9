"""A module with examples.

>>> 1 + 1
2
"""


def right():
    """
    >>> right()
    'right'
    """
    return "right"


def wrong():
    """
    >>> wrong()
    'right'
    """
    return "wrong"


def raises():
    """
    >>> raises()
    1
    """
    raise ValueError("in an example")


def skipped():
    """
    >>> skipped()  # doctest: +SKIP
    """
