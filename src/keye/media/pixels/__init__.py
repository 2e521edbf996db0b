"""Frames to model inputs: resize, tone mapping, patches."""
