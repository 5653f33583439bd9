"""One QEMU process: its owner, its command line, and how we control it."""
