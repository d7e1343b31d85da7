"""What the package shows of itself: names, signatures, and an import that costs nothing."""

import inspect
import subprocess
import sys

import lowmem_rlhf as lm

TRAINING = (
    "recipe, *, model=None, tokenizer=None, data=None, eval_data=None, rewards=None, overrides=(), output=None, "
    "resume=False, progress='auto'"
)
SIGNATURES = {
    "train": TRAINING,
    "Trainer": TRAINING,
    "plan": (
        "recipe, *, profile=None, vram=None, model=None, data=None, rewards=None, overrides=(), processes=None, "
        "machines=None, network=None"
    ),
    "open_run": "path, *, data=None, eval_data=None, rewards=None, trust=False, progress='auto'",
    "recipes": "",
    "Run.generate": "self, prompt, n=1, *, compare=False, max_tokens=None, temperature=None, seed=0, task=None",
    "Run.evaluate": "self, overrides=(), *, step=None, device=None",
    "Run.export": "self, format='merged', **options",
    "Run.plot": "self, path=None",
}
NAMES = [
    "__version__",
    "algorithms",
    "train",
    "Trainer",
    "plan",
    "PlanView",
    "open_run",
    "Run",
    "recipes",
    "Recipe",
    "Progress",
    "LowmemError",
    "UserError",
    "RunError",
    "SharedBase",
    "Group",
    "PackedBatch",
    "pack",
    "BatchLimits",
    "micro_batches",
    "packed_logprobs",
    "completion_logprobs",
    "packed_outputs",
    "head_outputs",
    "tiled_logprobs",
    "RolloutLimits",
    "Engine",
    "engine_for",
    "Sampling",
    "Completion",
    "Rollout",
    "Optimizer",
    "AlgorithmSpec",
    "register_algorithm",
    "register_engine",
    "ExportFormat",
    "register_format",
]


def parameters(thing) -> str:
    signature = inspect.signature(thing)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))[1:-1]


def test_the_names_and_signatures_of_the_api_are_pinned():
    assert lm.__all__ == NAMES
    assert sorted(NAMES) == dir(lm)
    for name, wanted in SIGNATURES.items():
        thing = lm
        for part in name.split("."):
            thing = getattr(thing, part)
        assert parameters(thing) == wanted, name
    assert all(getattr(lm, name) is not None for name in NAMES)
    assert all((getattr(lm, name).__doc__ or "").strip() for name in NAMES if name[0] != "_")


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, logging, os, warnings; before = dict(os.environ), list(warnings.filters)\n"
        "import lowmem_rlhf as lm; dir(lm)\n"
        "assert (dict(os.environ), list(warnings.filters)) == before\n"
        "assert not logging.getLogger('lowmem_rlhf').handlers and not logging.root.handlers\n"
        "heavy = ['torch', 'transformers', 'pydantic', 'numpy', 'rich', 'yaml', 'datasets', 'peft', 'matplotlib']\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "assert lm.UserError.exit_code == 2; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "False"]
    assert not run.stderr


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(lm, "trainn")
    assert lm.algorithms.__name__ == "lowmem_rlhf.algorithms"
