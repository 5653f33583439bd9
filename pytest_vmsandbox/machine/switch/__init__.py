"""The switch: it joins the network cards of guests, and can treat their frames badly.

`switch.py` is this process's side. The other modules are the program, which imports only them and the standard library.
"""
