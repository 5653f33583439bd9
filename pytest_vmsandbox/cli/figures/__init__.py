"""What guests cost on this machine: the figures of ``vmsandbox bench``.

`values` knows what the figures are, `guests` measures with guests of its own, `suites` with a pytest
that it starts, and `machine` says where that was.
"""
