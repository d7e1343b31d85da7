"""One PPO step of TRL's PPOTrainer with four separate models, timed and measured by phase.

    PYTHON-WITH-TRL-1.12 benchmarks/trl_ppo_step.py SPEC        led through its standard input, see children.py

SPEC is a JSON object, what `ppo_vs_trl.trl_spec` returns. The process has TRL's environment and nothing of ours but
files that need torch and psutil. Phases are told by the functions that `PPOTrainer.train` calls: it generates, then
scores until a forward pass has gradients, then updates until the step ends.
"""

import json
import os
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from typing import Any

from children import Channel
from work import LEARNING_RATE, torch_device

QUIET = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}


def four_models(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the models as TRL's example script makes them: each of its own, loaded from the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options = {"dtype": getattr(torch, spec["dtype"])}
    torch.manual_seed(0)  # of the score heads, which the file does not have
    return {
        "model": AutoModelForCausalLM.from_pretrained(spec["model"], **options),
        "ref_model": AutoModelForCausalLM.from_pretrained(spec["model"], **options),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, **options),
        "value_model": AutoModelForSequenceClassification.from_pretrained(spec["model"], num_labels=1, **options),
    }


def ppo_config(spec: dict[str, Any], folder: str) -> Any:
    """Return the PPOConfig of the work; whatever is not named is TRL's default."""
    from trl.experimental.ppo import PPOConfig

    rows = len(spec["prompts"]) * spec["generations"]
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=rows,
        total_episodes=rows * spec["steps"],
        num_ppo_epochs=spec["epochs"],
        response_length=spec["completion_length"],
        stop_token=None,
        temperature=1.0,
        kl_coef=spec["kl_coef"],
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        use_cpu=torch_device(spec["device"]).type == "cpu",
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )


def served_trainer(spec: dict[str, Any], folder: str, channel: Channel) -> Any:
    """Return TRL's trainer, each of whose steps waits for the parent's command ``step`` or ``bytes`` and answers it."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    from lowmem_rlhf.bench.meter import Meter
    from lowmem_rlhf.hardware.live_bytes import LiveBytes

    class Serve(TrainerCallback):
        def begin(self) -> None:
            counter = LiveBytes() if channel.command() == "bytes" else None
            self.counts: dict[str, Any] = {"start_bytes": counter.current if counter else 0, "update_tokens": 0}
            self.meter, self.stack = Meter(trainer.args.device, counter), ExitStack()
            self.stack.enter_context(counter or nullcontext())
            self.stack.enter_context(self.meter.phase("score"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stack.close()
            channel.send(seconds=dict(self.meter.seconds), peaks=dict(self.meter.peaks), **self.counts)

    def batch_generation(model: Any, queries: Any, *rest: Any) -> Any:
        serve.begin()
        with serve.meter.phase("rollout"):
            out = generate(model, queries, *rest)
        answers = out[0][:, queries.shape[1] :] != tokenizer.pad_token_id
        prompts = [len(prompt) for prompt in spec["prompts"]]
        serve.counts |= {"lengths": answers.sum(1).tolist(), "prompt_lengths": prompts}
        return out

    def forward(model: Any, query_responses: Any, pad_token_id: int) -> Any:
        if torch.is_grad_enabled():
            if not serve.counts["update_tokens"]:
                serve.stack.enter_context(serve.meter.phase("update"))
            serve.counts["update_tokens"] += 2 * query_responses.numel()  # policy and critic
        return run_model(model, query_responses, pad_token_id)

    generate, run_model = ppo_trainer.batch_generation, ppo_trainer.forward
    vars(ppo_trainer).update(batch_generation=batch_generation, forward=forward)
    serve, tokenizer = Serve(), AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as in the example script; never in an answer
    rows = [{"input_ids": ids} for ids in spec["prompts"] for _ in range(spec["generations"])]
    trainer = PPOTrainer(
        args=ppo_config(spec, folder),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[serve],
        **four_models(spec),
    )
    return trainer


def main() -> None:
    os.environ.update(QUIET)
    spec, channel = json.loads(sys.argv[1]), Channel()
    with tempfile.TemporaryDirectory() as folder:
        trainer = served_trainer(spec, folder, channel)
        names = ("per_device_train_batch_size", "gradient_checkpointing", "bf16", "num_ppo_epochs")
        settings = {name: getattr(trainer.args, name) for name in names}
        channel.ready(
            **settings,
            dtype=spec["dtype"],
            optim=str(trainer.args.optim.value),
            recomputes=trainer.policy_model.is_gradient_checkpointing,
        )
        trainer.train()


if __name__ == "__main__":
    main()
