"""The gate of a guest whose network is a list: what leaves the guest, and what does not."""
