"""Rows: read as they are, turned into prompts and examples, checked before anything is trained."""
