"""Lets the tests of this folder import `fake_pool`, which pytest's importlib mode leaves off the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
