"""Evaluations: what a model is asked, how its answers are scored, and the figures that come of it."""
