"""Extraction and comparison of answers: pure functions shared by evaluation, rewards and curation."""
