"""`python -m fasttricks.predict`: the command predict of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("predict")
