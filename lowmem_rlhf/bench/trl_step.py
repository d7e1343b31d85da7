"""One GRPO step of TRL's GRPOTrainer, run as a sensible user of TRL runs it, timed and measured by phase."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lowmem_rlhf.bench.meter import Meter, counter_for
from lowmem_rlhf.bench.work import ALPHA, BETA, LEARNING_RATE, RANK, hash_reward
from lowmem_rlhf.engine.load import DTYPES
from lowmem_rlhf.hardware.capabilities import capabilities


@dataclass(frozen=True)
class TrlWork:
    """What TRL's trainer does.

    Attributes:
        model: as in a recipe.
        device: where everything lies.
        questions: of the B prompts.
        generations, completion_length: G completions a prompt, each of exactly so many tokens.
        steps: that are asked for.
        rows: completions of a training batch (``per_device_train_batch_size``); 0: all of a step.
        compute_dtype: ``bfloat16``, ``float32``, or ``float16`` with loss scaling.
    """

    model: str
    device: torch.device
    questions: Sequence[str]
    generations: int
    completion_length: int
    steps: int
    rows: int = 0
    compute_dtype: str = "bfloat16"


class Channel(Protocol):
    """Who asks for steps: a process that is led by commands, or a list of them."""

    def ready(self, **settings: Any) -> None:
        """Take note of the settings that TRL chose."""
        ...

    def command(self) -> str:
        """Return ``step``, or ``bytes`` for a step whose memory is counted."""
        ...

    def send(self, **message: Any) -> None:
        """Take a step's figures."""
        ...


def trl_config(work: TrlWork, folder: str) -> Any:
    """Return the GRPOConfig of the work; whatever is not named is TRL's default.

    Raises:
        ValueError: the rows do not divide the completions.
    """
    from trl import GRPOConfig

    completions = len(work.questions) * work.generations
    rows = work.rows or completions
    if completions % rows:
        raise ValueError(f"{rows} rows of a training batch do not divide the {completions} completions of a step")
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=completions // rows,
        num_generations=work.generations,
        max_completion_length=work.completion_length,
        generation_kwargs={"min_new_tokens": work.completion_length},
        temperature=1.0,
        beta=BETA,
        loss_type="dapo",
        bf16=work.compute_dtype == "bfloat16",
        fp16=work.compute_dtype == "float16",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=work.steps,
        shuffle_dataset=False,
        use_cpu=capabilities(work.device).on_cpu,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )


def trl_trainer(work: TrlWork, folder: str, **more: Any) -> Any:
    """Return TRL's trainer with its phases metered: the attribute ``meter`` is set before each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    class Metered(GRPOTrainer):
        meter: Any
        counts: dict[str, Any]

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with self.meter.phase("other"):
                return super()._generate_and_score_completions(inputs)

        def _generate(self, prompts: Any) -> Any:
            with self.meter.phase("rollout"):
                out = super()._generate(prompts)
            self.counts["prompt_lengths"] = [len(ids) for ids in out[0][:: work.generations]]
            self.counts["lengths"] = [len(ids) for ids in out[1]]
            return out

        def _get_per_token_logps_and_entropies(self, model: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            training = torch.is_grad_enabled()
            self.counts["update_tokens"] = self.counts.get("update_tokens", 0) + training * input_ids.numel()
            with self.meter.phase("update" if training else "score"):
                return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    def reward(completions: list[Any], **columns: Any) -> list[float | None]:
        return [hash_reward(completion[0]["content"]) for completion in completions]

    model, path = trl_model(work)
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in work.questions]
    trainer: Any = Metered(
        model=model,
        reward_funcs=reward,
        args=trl_config(work, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        **more,
    )
    if work.compute_dtype != "bfloat16":  # TRL makes the adapters of quantized models bfloat16, which no scaler takes
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def trl_model(work: TrlWork) -> tuple[Any, str]:
    """Return the NF4 model, loaded as transformers' users do, and the path of its files."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lowmem_rlhf.architecture.source import resolve_model
    from lowmem_rlhf.engine.load import convert_gguf

    path = resolve_model(work.model)
    if path.endswith(".gguf"):
        path = str(convert_gguf(Path(path)))
    dtype = DTYPES[work.compute_dtype]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    options = {"dtype": dtype, "quantization_config": quantization, "device_map": {"": str(work.device)}}
    return AutoModelForCausalLM.from_pretrained(path, **options), path


def run_trl(work: TrlWork, channel: Channel) -> None:
    """Serve the commands of a channel from inside TRL's own training loop."""
    from transformers import TrainerCallback

    class Serve(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counter = counter_for(work.device) if channel.command() == "bytes" else None
            self.start = counter.current if counter else 0
            trainer.counts, trainer.meter = {}, Meter(args.device, counter)
            self.stack = ExitStack()
            self.stack.enter_context(counter or nullcontext())
            self.stack.enter_context(trainer.meter.phase("update"))  # whatever is in no phase of its own

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack.close()
            seconds, peaks = dict(trainer.meter.seconds), dict(trainer.meter.peaks)
            channel.send(seconds=seconds, peaks=peaks, start_bytes=self.start, **trainer.counts)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(work, folder, callbacks=[Serve()])
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16")
        settings = {name: getattr(trainer.args, name) for name in names}
        channel.ready(**settings, optim=str(trainer.args.optim.value))
        trainer.train()
