"""The user's cache: how things in it are made, found, checked and removed."""
