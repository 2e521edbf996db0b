"""Quantised weights: layers that hold them, how numbers become codes, and which part of a model takes which format.

Knows matrices and names of tensors; nothing of files and networks.
"""
