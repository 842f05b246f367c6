"""`python -m fasttricks.evaluate`: the command evaluate of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("evaluate")
