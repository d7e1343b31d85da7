"""The reference of the Python API: each public name, its docstring read by mkdocstrings."""

import lowmem_rlhf as lm

GROUPS = {
    "Runs": ("train", "Trainer", "Run", "open_run", "plan", "PlanView", "recipes", "Recipe", "Progress"),
    "Errors": ("LowmemError", "UserError", "RunError"),
    "The pieces of a step": (
        *("SharedBase", "Group", "PackedBatch", "pack", "BatchLimits", "micro_batches", "packed_logprobs"),
        *("completion_logprobs", "packed_outputs", "head_outputs", "tiled_logprobs", "RolloutLimits", "Engine"),
        *("engine_for", "Sampling", "Completion", "Rollout", "Optimizer"),
    ),
    "Adding one's own": ("AlgorithmSpec", "register_algorithm", "register_engine", "ExportFormat", "register_format"),
}
_HEAD = """# Python API

Made of the docstrings when this site is built. `import lowmem_rlhf as lm` gives every name below; how they are used:
[python.md](python.md)."""


def page() -> str:
    """Return the page; mkdocstrings fills it in."""
    parts = [_HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        parts += [f"::: lowmem_rlhf.{lm._PLACES[name]}.{name}" for name in names]
    return "\n\n".join(parts) + "\n"
