"""`python -m sparsae`: the same commands as `sparsae`."""

import sys

from sparsae.cli import main

if __name__ == "__main__":
    sys.exit(main())
