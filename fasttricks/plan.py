"""`python -m fasttricks.plan`: the command plan of fasttricks.commands."""

from fasttricks.commands import start

if __name__ == "__main__":
    start("plan")
