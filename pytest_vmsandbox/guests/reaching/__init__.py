"""How a guest is reached: programs start there, and files come and go."""
