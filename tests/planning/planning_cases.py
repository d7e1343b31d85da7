"""What the planning tests are about: configs of real models (the numbers of their config.json) and devices."""

from typing import Any

from lowmem_rlhf.hardware.device import Device

GIB = 1024**3


def _config(model_type: str, hidden: int, layers: int, heads: int, kv_heads: int, inner: int, **more: Any) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "max_position_embeddings": 8192,
        **more,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _config("llama", 576, 30, 9, 3, 1536, vocab_size=49152, tie_word_embeddings=True),
    "Qwen2.5-0.5B": _config("qwen2", 896, 24, 14, 2, 4864, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-1.5B": _config("qwen2", 1536, 28, 12, 2, 8960, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-7B": _config("qwen2", 3584, 28, 28, 4, 18944, vocab_size=152064, tie_word_embeddings=False),
    "Llama-3.2-1B": _config("llama", 2048, 16, 32, 8, 8192, vocab_size=128256, tie_word_embeddings=True, head_dim=64),
    "TinyLlama-1.1B": _config("llama", 2048, 22, 32, 4, 5632, vocab_size=32000, tie_word_embeddings=False),
    "gemma-3-1b": _config("gemma3_text", 1152, 26, 4, 1, 6912, vocab_size=262144, head_dim=256),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
}
# the fields of Gemma 4 E2B's text model that decide its size
GEMMA_4_E2B = {
    "model_type": "gemma4_text",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def card(free_gib: float, bf16: bool = False, source: str = "nvml") -> Device:
    """Return an NVIDIA card: Ada when it has bfloat16, otherwise Turing."""
    name = "NVIDIA GeForce RTX 4090" if bf16 else "NVIDIA GeForce RTX 2080 Ti"
    capability = (8, 9) if bf16 else (7, 5)
    return Device("cuda:0", name, int(free_gib * GIB), int(free_gib * GIB), capability, bf16, source=source)


def cpu(free_gib: float) -> Device:
    """Return a CPU with this much free RAM."""
    return Device("cpu", "CPU", int(free_gib * GIB), int(free_gib * GIB), None, False)
