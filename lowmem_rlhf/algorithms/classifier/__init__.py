"""Sequence classifiers, trained whole, for the `classifier` reward."""
