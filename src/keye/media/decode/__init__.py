"""Sandboxed workers: bytes to frames."""
