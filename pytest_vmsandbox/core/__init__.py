"""Values, errors, time and paths. Every other layer uses them."""
