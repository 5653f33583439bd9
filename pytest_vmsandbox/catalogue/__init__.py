"""The images that guests boot: how they are described, found, built and kept."""
