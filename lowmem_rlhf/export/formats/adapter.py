"""``--format adapter``: the LoRA adapter as peft saves it; of a reward model with its score head."""

import json
from pathlib import Path
from typing import Any

from lowmem_rlhf.algorithms.spec import AlgorithmSpec
from lowmem_rlhf.architecture.adapters import CONFIG, WEIGHTS
from lowmem_rlhf.architecture.dimensions import ModelDimensions
from lowmem_rlhf.architecture.families.wrappers import WRAPPERS
from lowmem_rlhf.export.formats.adapter_files import copy_adapter, copy_heads, name_for
from lowmem_rlhf.export.formats.format import ExportBytes, ExportFormat, Written
from lowmem_rlhf.export.job import ExportJob
from lowmem_rlhf.export.options import ORIGINAL, TEXT, WRAPPER
from lowmem_rlhf.export.target import EXPORT
from lowmem_rlhf.planning.memory.export import export_memory_bytes


class AdapterFormat(ExportFormat):
    """The files of the adapter, copied, and loaded with stock peft as their proof."""

    name = "adapter"
    takes = frozenset({"heads", "as_class"})
    holds_scores = True
    library = "peft"
    relation = "adapter"
    tags = ("lora",)

    def bytes(self, job: ExportJob, dims: ModelDimensions) -> ExportBytes:
        """Nothing is merged: the live policy is opened, and then the same in stock transformers and peft."""
        parts = export_memory_bytes(dims, job.settings["quantization"], job.settings["compute_dtype"], onto=ORIGINAL)
        memory = {"live_policy": parts["live_policy"], "loaded_again": parts["stock_policy"]}
        return ExportBytes(None, memory, sum(path.stat().st_size for path in job.adapter.rglob("*.safetensors")))

    def write(self, job: ExportJob, folder: Path) -> Written:
        """Copy the adapter, and the heads that were asked for."""
        copy_adapter(job.adapter, folder, (WEIGHTS, CONFIG))
        facts: dict[str, Any] = dict(copy_heads(job, folder))
        if names := self._names(job):
            for config in folder.rglob(CONFIG):  # a critic and what it lies above as well
                name_for(config.parent, names, job.base_type)
            facts["for"] = names
        return Written(facts)

    def _names(self, job: ExportJob) -> str | None:
        """Return the class whose names the adapter carries; None where the base has but one.

        By default it is that of `AutoModelForCausalLM`, or the whole model's where there is none.
        """
        wrapper = WRAPPERS.get(job.base_type)
        if wrapper is None:
            return None
        return job.options.as_class or (TEXT if wrapper.causal_lm else WRAPPER)

    def prove(self, job: ExportJob, folder: Path, written: Written) -> dict[str, Any]:
        """Compare the files in stock peft on a stock base with the live policy, or with the live reward model."""
        from lowmem_rlhf.export.proof.outputs import policy_outputs
        from lowmem_rlhf.export.proof.scores import proof_of_scores
        from lowmem_rlhf.export.proof.verify import proof_of_adapter

        live = policy_outputs(job.opened, job.options.device)
        proof = proof_of_adapter if live.scores is None else proof_of_scores
        if written.facts.get("for") != WRAPPER:
            return proof(folder, live, job.device, job.settings)
        from lowmem_rlhf.export.proof.names import check_names

        loads_on = check_names(folder, job.adapter, job.recipe)  # then the numbers, on the text tower alone
        return proof(job.adapter, live, job.device, job.settings) | {"loads_on": loads_on}

    def usage(self, folder: Path, name: str, base: str, spec: AlgorithmSpec | None) -> str:
        """Loading it with peft; of a reward model, the reward that scores with it."""
        if spec is not None and spec.output == "scores":
            return "```yaml\nrewards:\n- function: reward_adapter\n  options: {adapter: .}  # this folder\n```"
        told = folder / EXPORT
        facts = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        auto = "AutoModelForMultimodalLM" if facts.get("for") == WRAPPER else "AutoModelForCausalLM"
        return (
            f"```python\nfrom peft import PeftModel\nfrom transformers import {auto}\n\n"
            f'base = {auto}.from_pretrained("{base}")  # exact in the precision of the plan\n'
            'model = PeftModel.from_pretrained(base, ".")  # this folder, or its Hub id\n```'
        )
