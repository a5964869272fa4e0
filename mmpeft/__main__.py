"""`python -m mmpeft`: the command line."""

import sys

from mmpeft.cli import main

sys.exit(main())
