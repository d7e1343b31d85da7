"""Ollama: the Modelfile and its template."""
