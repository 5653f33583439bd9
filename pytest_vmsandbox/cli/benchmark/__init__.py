"""Measures what guests cost on this machine, for ``vmsandbox bench``.

`guests` measures with guests of its own, and defines results. `suites` measures with a pytest that it
starts.
"""
