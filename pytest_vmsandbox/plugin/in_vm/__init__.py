"""Tests that run inside guests: how pytest runs them, and what comes back."""
