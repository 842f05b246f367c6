"""`python -m fasttricks.data.prepare`: the command data of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("data")
