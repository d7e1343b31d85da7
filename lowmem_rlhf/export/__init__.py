"""Exporting a trained model as an adapter, a merged folder, a GGUF or for Ollama, each proven, with a model card."""
