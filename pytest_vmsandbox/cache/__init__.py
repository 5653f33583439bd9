"""What lies in the user's cache: how it is made, found, checked and removed."""
