"""Changes of basis: where they are free, and which one to take."""
