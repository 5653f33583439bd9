"""Disks from elsewhere: fetched, unpacked, checked, and converted in a jail. Nothing in them is trusted."""
