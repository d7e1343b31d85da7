"""A run's adapter merged into its base, from file to file."""
