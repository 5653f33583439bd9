"""Starts a program of this folder, which works as a package in any place."""

import importlib
import os
import sys

sys.path.append(os.path.dirname(sys.path.pop(0)))
module = {"lend": "runner.terminal", "wait": "runner.relay"}.get(sys.argv[1], "runner.supervisor")
program = getattr(importlib.import_module(module), sys.argv[1])
sys.path.pop()
program(sys.argv[2])
