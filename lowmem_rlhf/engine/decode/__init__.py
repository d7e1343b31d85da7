"""Decoding: products of few rows, the decoder without modules, and both in C."""
