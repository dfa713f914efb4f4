"""`python -m mvar_lightning`: the command `mvar`."""

import sys

from mvar_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
