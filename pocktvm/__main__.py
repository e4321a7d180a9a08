"""`python -m pocktvm` is the command line."""

from pocktvm.cli import main

if __name__ == "__main__":
    main()
