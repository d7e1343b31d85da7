"""A finished run: opened, asked, talked to."""
