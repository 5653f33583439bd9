"""Images: how they are described, found, built and kept."""
