"""How long a run takes: pure arithmetic in seconds, without torch."""
