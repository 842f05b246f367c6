"""A run on paper: memory, link, time."""
