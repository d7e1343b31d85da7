"""The Python API: what `import lowmem_rlhf` gives."""
