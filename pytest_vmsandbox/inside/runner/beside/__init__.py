"""What plugins of others keep beside reports: a file for each, as on the host's side."""
