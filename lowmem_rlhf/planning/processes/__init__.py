"""The plan of a run in several processes, one a card: shares, memory, time, and what they send. No torch."""
