"""Scorers of other people's evaluation code, reproduced with their faults: equal predictions get equal scores.

What is right is in `keye.scoring.strict`. Each module has the scorers of some tasks; `registry` finds them by name.
"""
