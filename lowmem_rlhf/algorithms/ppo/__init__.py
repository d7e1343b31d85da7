"""PPO: clipped policy optimisation with a critic."""
