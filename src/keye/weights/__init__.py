"""Tensors in checkpoint files."""
