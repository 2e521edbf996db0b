"""Lets the tests of this folder import one another and `tiny`, which pytest's importlib mode leaves off the path."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
