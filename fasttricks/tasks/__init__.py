"""What a run learns, from what, and by what it is judged: all that knows what a batch holds."""
