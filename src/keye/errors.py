"""Errors that are the user's to fix. Every other exception is a bug of ours and shows its traceback."""

from __future__ import annotations


class KeyeError(ValueError):
    """A mistake in what the user gave: a file, a name, a setting.

    The message is one sentence that names the thing and says what to do. The command line prints it without a
    traceback and exits with code 2; libraries may catch it as `ValueError`.
    """


class MediaError(KeyeError):
    """An image or video that cannot be used: missing, damaged, cut short, too large, or of a kind we do not read."""
