"""GRPO: group-relative policy optimisation."""
