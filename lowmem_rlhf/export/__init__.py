"""Taking a model away: adapters, merged folders, GGUF and Ollama, each proven, with its card."""
