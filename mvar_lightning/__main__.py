"""`python -m mvar_lightning`: the command `mvar`."""

import sys

from mvar_lightning.cli import main

sys.exit(main())
