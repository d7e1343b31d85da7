"""From a recipe to a finished run: check, plan, open, run."""
