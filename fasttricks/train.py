"""`python -m fasttricks.train`: the command train of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("train")
