"""Starts a program of this folder, which works as a package in any place."""

import importlib
import os
import sys

sys.path.append(os.path.dirname(sys.path.pop(0)))
program = getattr(importlib.import_module("runner.supervisor"), sys.argv[1])
sys.path.pop()
program(sys.argv[2])
