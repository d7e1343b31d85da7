"""GGUF files for llama.cpp: written, read back, proven."""
