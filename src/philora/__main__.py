"""`python -m philora`."""

from philora.cli import main

if __name__ == "__main__":
    main()
