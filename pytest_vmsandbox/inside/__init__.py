"""Tests inside guests: what goes to a guest, and the session that runs the tests there."""
