"""`python -m rcpo`: the command line."""

from rcpo.cli import main

if __name__ == "__main__":
    main()
