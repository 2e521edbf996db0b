"""The version of the package and the folder it is installed in."""

from pathlib import Path
from typing import Final

__version__: Final = "0.2.0"
PACKAGE_FOLDER: Final = Path(__file__).resolve().parent
