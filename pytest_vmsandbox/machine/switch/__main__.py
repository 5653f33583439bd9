"""Starts the program: this folder is executed (``python -I -S FOLDER CONTROL-FD [UID GID]``), and works as a package."""

import os
import sys

sys.path.append(os.path.dirname(sys.path.pop(0)))
from switch.program import main  # type: ignore[import-not-found]  # by the line above

sys.path.pop()
main(int(sys.argv[1]), *map(int, sys.argv[2:]))
