"""Predicted cost of requests: bytes, seconds and fleet sizes."""
