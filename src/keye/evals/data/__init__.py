"""Data of benchmarks on disk: tables, archives, media that decode."""
