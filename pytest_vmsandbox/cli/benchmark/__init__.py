"""Measures what guests cost on this machine, for ``vmsandbox bench``.

`guests` measures with guests of its own, `suites` with a pytest that it starts; `result` has what
both give, and `machine` says where that was.
"""
