"""Bytes to frames, patches, grids and positions. Never imports the networks.

Empty, so that decode workers start without numpy.
"""
