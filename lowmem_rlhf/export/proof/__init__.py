"""The proof of an export: what the live policy says, what stock transformers says, how far they are apart."""
