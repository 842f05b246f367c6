"""`python -m fasttricks.show`: the command show of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("show")
