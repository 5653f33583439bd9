"""Values, errors, time and paths: what every other layer stands on."""
