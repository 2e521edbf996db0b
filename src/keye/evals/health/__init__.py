"""Whether a model answers as it should: probes, their ranges, a verdict."""
