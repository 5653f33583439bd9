"""One QEMU process and all that belongs to it: who owns it, what its command line is, how it is driven."""
