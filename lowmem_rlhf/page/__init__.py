"""The page of a run: what it reads, what serves it, and the one file that a report is. No torch here."""
