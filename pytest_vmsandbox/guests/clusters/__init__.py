"""Several guests that belong together, declared in one place."""
