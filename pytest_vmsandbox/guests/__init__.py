"""What users hold: guests, the factory that boots them, and the ways into them."""
