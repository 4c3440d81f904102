"""`python -m philora`."""

from philora.cli.commands import main

if __name__ == "__main__":
    main()
