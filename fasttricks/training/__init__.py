"""One run: what it is, how it is built, saved and resumed."""
