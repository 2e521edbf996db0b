"""The releases of Keye-VL, one module each. No other package compares the name of a release: it asks the object."""

from keye.releases.base import (
    RELEASES,
    FrameBudget,
    FrameDemand,
    Release,
    find_release,
    register,
    releases_by_architecture,
)
from keye.releases.preview import PREVIEW
from keye.releases.v1_5 import V1_5
from keye.releases.v2 import V2
from keye.releases.v671b import V671B

__all__ = [
    "PREVIEW", "RELEASES", "V1_5", "V2", "V671B", "FrameBudget", "FrameDemand", "Release",
    "find_release", "register", "releases_by_architecture",
]  # fmt: skip
