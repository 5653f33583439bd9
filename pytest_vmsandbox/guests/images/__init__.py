"""Images are made by guests: how each kind of them is made."""
