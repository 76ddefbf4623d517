"""Evaluation: replies to questions, their judgment, ratings, benchmarks and probes.

:mod:`.records` has the files that pass between the commands. Nothing is imported here.
"""
