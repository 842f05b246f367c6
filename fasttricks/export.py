"""`python -m fasttricks.export`: the command export of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("export")
