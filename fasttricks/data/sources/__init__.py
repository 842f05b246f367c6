"""Images on disk, by number."""
