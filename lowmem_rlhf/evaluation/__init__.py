"""Held-out evaluation after the fact: what a run or a model is worth, with intervals, kept in the run directory."""
