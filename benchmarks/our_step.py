"""The step of our engine that ``lowmem_rlhf.bench`` measures, with the settings that a benchmark's flags describe."""

import argparse

from lowmem_rlhf.bench.our_step import Cut, OurStep, Prompts

__all__ = ["Cut", "OurStep", "Prompts", "cut_of"]


def cut_of(work: argparse.Namespace) -> Cut:
    """Return the settings that the flags describe; all completions are written at once."""
    rows, dequantized = work.prompts * work.generations, work.rollout_weights == "dequantized"
    return Cut(rows, work.micro_batch_tokens, work.tile, work.checkpointing, dequantized)
