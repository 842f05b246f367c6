"""`python -m fasttricks`: the console script `fasttricks`."""

from fasttricks.commands import main

if __name__ == "__main__":
    main()
