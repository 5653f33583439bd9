"""Measures what guests cost on this machine, for ``vmsandbox bench``.

`guests` measures with guests of its own, and has what a measurement gives; `suites` measures with a
pytest that it starts.
"""
