"""Figures of evaluations over generated videos, and their tables for a terminal."""
