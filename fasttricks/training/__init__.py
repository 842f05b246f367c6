"""One run: how it is built, saved and resumed."""
