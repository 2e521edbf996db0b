"""The compiled CPU backend: build, trial and calls."""
