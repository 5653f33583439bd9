"""The side of pytest: its options, which images a test runs on, where artifacts go."""
