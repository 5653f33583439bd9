"""Values, errors and time: what every other layer stands on. No input or output happens here."""
