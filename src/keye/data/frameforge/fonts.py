"""The one font of rendered text: Pillow's built-in FreeType font, and its measures in units of the font size."""

from functools import lru_cache

from PIL import ImageFont

_REFERENCE_SIZE = 200


@lru_cache(maxsize=256)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The built-in font at `size` pixels."""
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "every wheel of pillow on PyPI has FreeType"
    return loaded


@lru_cache(maxsize=256)
def advance(character: str) -> float:
    """Width of one character, as a fraction of the font size."""
    return font(_REFERENCE_SIZE).getlength(character) / _REFERENCE_SIZE


@lru_cache(maxsize=1)
def cap_height() -> float:
    """Height of upper-case letters above the baseline, as a fraction of the font size."""
    return -font(_REFERENCE_SIZE).getbbox("H", anchor="ls")[1] / _REFERENCE_SIZE
