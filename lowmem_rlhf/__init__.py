"""RLHF on one consumer graphics card: one frozen quantized base, small adapters, a plan made before the run."""

__version__ = "0.1.0"
