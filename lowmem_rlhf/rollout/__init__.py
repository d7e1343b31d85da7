"""Completions of prompts and the engines that sample them."""
