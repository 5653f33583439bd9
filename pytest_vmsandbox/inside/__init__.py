"""Tests that run inside a guest: what goes there, and the session that runs them."""
