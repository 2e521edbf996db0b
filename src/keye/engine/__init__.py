"""Inference: requests, caches, sampling and the loop that joins them."""
