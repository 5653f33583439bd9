"""Faults that a test brings about in its guest."""
