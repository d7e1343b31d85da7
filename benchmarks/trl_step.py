"""One GRPO step of TRL's GRPOTrainer, run as a sensible user of TRL runs it, timed and measured by phase."""

import argparse
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from children import Channel
from work import ALPHA, BETA, LEARNING_RATE, RANK, hash_reward, questions, torch_device


def trl_config(work: argparse.Namespace, folder: str) -> Any:
    """Return the GRPOConfig of the work; whatever is not named is TRL's default."""
    from trl import GRPOConfig

    completions = work.prompts * work.generations
    rows = work.trl_rows or completions
    if completions % rows:
        raise SystemExit(f"--trl-rows {rows} does not divide the {completions} completions")
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
        bf16=True,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=work.repeats + 2,
        shuffle_dataset=False,
        use_cpu=torch_device(work.device).type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )


def trl_trainer(work: argparse.Namespace, folder: str, **more: Any) -> Any:
    """Return TRL's trainer with its phases metered: the attribute ``meter`` is set before each step."""
    import torch
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

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [hash_reward(completion[0]["content"]) for completion in completions]

    model, path = trl_model(work)
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in questions(work)]
    return Metered(
        model=model,
        reward_funcs=reward,
        args=trl_config(work, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        **more,
    )


def trl_model(work: argparse.Namespace) -> tuple[Any, str]:
    """Return the NF4 model, loaded as transformers' users do, and the path of its files."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from lowmem_rlhf.architecture.source import resolve_model
    from lowmem_rlhf.engine.load import convert_gguf

    path = resolve_model(work.model)
    if path.endswith(".gguf"):
        path = str(convert_gguf(Path(path)))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    placed = {"": str(torch_device(work.device))}
    options = {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": placed}
    return AutoModelForCausalLM.from_pretrained(path, **options), path


def run_trl(work: argparse.Namespace, channel: Channel) -> None:
    """Serve the parent's commands from inside TRL's own training loop."""
    from meter import Meter
    from transformers import TrainerCallback

    from lowmem_rlhf.hardware.live_bytes import LiveBytes

    class Serve(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counter = LiveBytes() if channel.command() == "bytes" else None
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
