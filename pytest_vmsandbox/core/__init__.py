"""Values, errors, time, paths, and digests of files: what every other layer stands on."""
