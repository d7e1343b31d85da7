"""The algorithms, one folder each: what it is (`spec`, without torch), its mathematics on numbers alone, its update."""
