"""What a guest runs on: its power, its QEMU, and how it goes on after it was saved."""
