"""Checks on requests before they reach the application: limits, keys, rates, headers. No web framework."""
