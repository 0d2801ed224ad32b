"""`python -m batchgen` is the command `batchgen`."""

from batchgen.cli import main

if __name__ == "__main__":
    main()
