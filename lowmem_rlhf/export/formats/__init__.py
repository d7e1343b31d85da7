"""The export formats, one class each."""
