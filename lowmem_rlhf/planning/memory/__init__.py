"""Bytes of a run, phase by phase: pure arithmetic."""
