"""Devices: found, described, and what each kind can do."""
