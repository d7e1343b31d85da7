"""Reward models from preference pairs, as an adapter with a score head."""
