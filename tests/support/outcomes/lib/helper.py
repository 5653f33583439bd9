"""Found through the ini key `pythonpath`."""


def check(value):
    __tracebackhide__ = True
    if value != 1:
        raise ValueError(f"not one: {value}")


def deep(levels):
    if not levels:
        raise LookupError("at the bottom")
    deep(levels - 1)
