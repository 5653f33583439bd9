"""Starts a program of this folder, which is a package wherever it lies."""

import importlib
import os
import sys

sys.path.append(os.path.dirname(sys.path.pop(0)))
module, function = {"serve": ("supervisor", "serve"), "attach": ("attach", "attach")}[sys.argv[1]]
program = getattr(importlib.import_module("runner." + module), function)
sys.path.pop()
program(sys.argv[2])
