"""RLOO: REINFORCE with the mean of the other completions as baseline."""
