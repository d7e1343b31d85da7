"""Rollouts that a server samples: vLLM, or llama.cpp's."""
