"""``python -m fxsvd``."""

import sys

from fxsvd.cli import main

sys.exit(main())
