"""Runs of guests that are recorded, and repeated to the byte."""
