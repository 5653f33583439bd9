"""Private networks between guests."""
