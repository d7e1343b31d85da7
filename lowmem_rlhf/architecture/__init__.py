"""What a model is, without torch: where it comes from, its sizes, the table of families, its fingerprint."""
