"""`python -m fasttricks.cost`: the command cost of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("cost")
