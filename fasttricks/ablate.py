"""`python -m fasttricks.ablate`: the command ablate of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("ablate")
