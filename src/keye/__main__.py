"""`python -m keye`: the command line."""

import sys

from keye.cli import main

sys.exit(main())
