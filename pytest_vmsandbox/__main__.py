"""``python -m pytest_vmsandbox`` is the command `vmsandbox`."""

from pytest_vmsandbox.cli import main

if __name__ == "__main__":
    main()
