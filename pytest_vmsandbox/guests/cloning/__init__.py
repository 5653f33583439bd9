"""Where guests come from: templates are made, and clones go on from them, or from a guest that runs."""
