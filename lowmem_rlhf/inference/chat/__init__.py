"""Conversations with a trained policy and its reference."""
