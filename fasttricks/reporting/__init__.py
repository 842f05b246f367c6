"""The page of a run: its numbers as charts and tables in one HTML file that loads nothing and runs no code."""
