"""A PPO step with all roles on one base, against our GRPO step and against TRL's PPOTrainer with four models.

    python benchmarks/ppo_vs_trl.py [--env FOLDER] [--prompts 2] [--generations 8] [--completion-length 128] [--json]

The work: B prompts x G completions of exactly L tokens at temperature 1; the sides get the same prompts' token ids.
Three sides, each in a process of its own:

ppo   ours. One NF4 base (bf16 compute) carries all roles: the policy, a LoRA of rank 16 on all linear layers; the
      reference, the base without it; the critic, a second such adapter with a value head, trained; the reward model, a
      third one with a score head, frozen. kl_coef 0.05, --epochs epochs of one mini-batch, AdamW.
grpo  ours. The GRPO step of step_vs_trl.py: policy and reference on the same base, rewards from a hash of the text.
trl   PPOTrainer of TRL 1.12.0, the last release with PPO, as its example script examples/scripts/ppo/ppo.py runs it
      without LoRA: four separate models from the same weights, policy and value model trained in full, reference and
      reward model frozen; value and reward model are AutoModelForSequenceClassification. All B * G rows in one batch,
      TRL's defaults for the rest (adamw_torch_fused). gradient_checkpointing=True is among these and has no effect:
      `PPOTrainer.train` does not switch it on (``recomputes`` in the settings is false). Weights, gradients and
      optimizer states are bfloat16, which is kind to TRL: the default of `trl.ModelConfig.dtype` is float32, about
      twice the memory (--trl-dtype float32).

The trl side needs --env: tests/fixtures/trl_ppo/record.py makes a virtual environment of its releases in that folder
(minutes, once). Without it the other two sides run.

Ours take turns: a warm-up step, --repeats timed ones (the table shows medians), one under a counter of live tensor
bytes (live_bytes.py) whose time does not count. TRL's side does the same after ours have ended. Phases: rollout; score
(log-probs of policy and reference, values, rewards, advantages; TRL takes the policy's log-probs from its rollout);
update (forward, backward and optimizer step of policy and critic); other (rewards and advantages of GRPO). A peak holds
everything that lives in the process, the weights included.

What is left out: what step_vs_trl.py leaves out, and answers that end early.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from children import Channel, Child
from step_vs_trl import PHASES, figures
from work import RANK, ROOT, add_engine_flags, add_work_flags, questions, torch_device

OURS = ("ppo", "grpo")
TITLES = {"ppo": "PPO, one base", "grpo": "GRPO, one base", "trl": "TRL PPO, four models"}
BOUNDS = {"grpo": 1.25, "trl": 0.15}  # the peak of ours, as a share of theirs
ALWAYS = {
    "critic_adapter": "critic's adapter",
    "critic_optimizer_state": "critic's optimizer state",
    "reward_adapter": "reward model's adapter",
    "heads": "value and score head",
}
PASSING = {  # what is not there between steps
    "critic_gradients": "critic's gradients, during the update",
    "critic_copies": "critic's 16-bit copies, in place of the policy's",
}
WITH = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"  # run under another Python


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add_work_flags(parser)
    add_engine_flags(parser)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=1, help="PPO epochs, of one mini-batch each")
    parser.add_argument("--env", type=Path, metavar="FOLDER", help="virtual environment of TRL 1.12.0, made if missing")
    parser.add_argument("--trl-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of TRL's weights")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=OURS, help=argparse.SUPPRESS)  # a child process
    parser.set_defaults(repeats=1)
    return parser


def run_side(work: argparse.Namespace) -> None:
    """Be one of our sides: serve the parent's commands ``step`` and, for a step under the counter, ``bytes``."""
    channel = Channel()
    from our_ppo_step import OurPPOStep
    from our_step import OurStep, cut_of

    device = torch_device(work.device)
    ours = OurPPOStep(work, device) if work.side == "ppo" else OurStep(work.model, device)
    prompts, cut = ours.encode(questions(work)), cut_of(work)
    channel.ready(
        prompts=prompts,
        micro_batch_tokens=cut.micro_batch_tokens,
        tile=cut.tile,
        gradient_checkpointing=cut.checkpointing,
        rollout_weights=work.rollout_weights,
    )
    for _ in range(work.repeats + 2):
        count = channel.command() == "bytes"
        step = ours.measure(prompts, work.generations, work.completion_length, cut, count)
        channel.send(**step, held=ours.held() if isinstance(ours, OurPPOStep) else {})


def trl_spec(work: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return what trl_ppo_step.py is told."""
    from model_folders import model_folder

    return {
        "model": str(model_folder(work.model)),
        "prompts": prompts,
        "generations": work.generations,
        "completion_length": work.completion_length,
        "epochs": work.epochs,
        "kl_coef": work.kl_coef,
        "dtype": work.trl_dtype,
        "device": work.device,
        "steps": work.repeats + 2,
    }


def trl_child(work: argparse.Namespace, prompts: Sequence[Sequence[int]]) -> Child:
    """Start TRL's side in its environment, which is made if need be."""
    sys.path.insert(0, str(ROOT / "tests" / "fixtures" / "trl_ppo"))
    from record import prepared

    python, script = prepared(work.env.resolve()), Path(__file__).with_name("trl_ppo_step.py")
    return Child("trl", ["-c", WITH, str(python), str(script), json.dumps(trl_spec(work, prompts))])


def measure(work: argparse.Namespace, arguments: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run our two sides in turns, then TRL's; return the figures of each.

    Raises:
        SystemExit: a side failed, or has not the prompts or lengths that it was to have.
    """
    ours = [Child(name, [__file__, *arguments, "--side", name]) for name in OURS]
    settings = {side.name: side.answer()["settings"] for side in ours}
    prompts = [setting.pop("prompts") for setting in settings.values()]
    if prompts[0] != prompts[1]:
        raise SystemExit("our sides were given different prompts")
    found = _take(work, ours, settings, say)
    if work.env:
        say("trl: starting")
        trl = trl_child(work, prompts[0])
        found |= _take(work, [trl], {"trl": trl.answer()["settings"]}, say)
    return found


def _take(
    work: argparse.Namespace, sides: Sequence[Child], settings: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    steps: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for turn in range(work.repeats + 1):
        for side in sides if turn % 2 else reversed(sides):
            step = side.take("step")
            say(f"{side.name}: {f'step {turn}' if turn else 'warm-up'} {sum(step['seconds'].values()):.1f} s")
            if turn:
                steps[side.name].append(step)
    found = {}
    for side in sides:
        say(f"{side.name}: counting live bytes")
        counted = side.take("bytes")
        found[side.name] = figures(steps[side.name], counted, settings[side.name], work)
        if counted.get("held"):
            found[side.name]["held_bytes"] = counted["held"]
        side.close()
    return found


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Return our PPO / the other side, for every figure that both have."""
    ours = found["ppo"]
    return {
        f"ppo/{name}": {
            key: {p: ours[key][p] / other[key][p] for p in ours[key] if other[key][p] and ours[key][p]}
            for key in ("seconds", "peak_bytes")
        }
        for name, other in found.items()
        if name != "ppo"
    }


def verdicts(found: dict[str, Any]) -> dict[str, Any]:
    """Return for each bound the ratio of the peaks, the bound, and whether it holds."""
    peaks = {name: figure["peak_bytes"]["step"] for name, figure in found.items()}
    return {
        f"peak ppo/{name}": {
            "ratio": peaks["ppo"] / peaks[name],
            "bound": bound,
            "holds": peaks["ppo"] <= bound * peaks[name],
        }
        for name, bound in BOUNDS.items()
        if name in found
    }


def beyond_grpo(found: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that PPO holds and GRPO does not: counted part by part, and measured."""
    ppo, grpo = found["ppo"], found["grpo"]
    held = ppo["held_bytes"]
    between = sum(held[part] for part in ALWAYS)
    return {
        **{part: held[part] for part in (*ALWAYS, *PASSING)},
        "between_steps": between,
        "between_steps_measured": ppo["bytes_before"] - grpo["bytes_before"],
        "in_update": between + held["critic_gradients"],
        "in_update_measured": ppo["peak_bytes"]["update"] - grpo["peak_bytes"]["update"],
    }


def print_table(found: dict[str, Any], work: argparse.Namespace) -> None:
    """Print the figures for people."""
    from rich.console import Console
    from rich.table import Table

    what = f"{work.prompts} prompts x {work.generations} completions x {work.completion_length} tokens"
    table = Table(title=f"one step, {what}; ours NF4 + LoRA r{RANK}", title_style="bold")
    table.add_column("")
    for name in found:
        table.add_column(TITLES[name], justify="right")
    for name in list(found)[1:]:
        table.add_column({"grpo": "PPO / GRPO", "trl": "PPO / TRL"}[name], justify="right")

    def row(label: str, values: list[float], form: Callable[[float], str]) -> None:
        shares = [f"{values[0] / value:.3f}" if value and values[0] else "" for value in values[1:]]
        table.add_row(label, *(form(value) if value else "" for value in values), *shares)

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
    print_beyond(beyond_grpo(found))
    for name, verdict in verdicts(found).items():
        outcome = "holds" if verdict["holds"] else "MISSED"
        print(f"{name}: {verdict['ratio']:.3f}; must be at most {verdict['bound']}: {outcome}")
    if "trl" not in found:
        print("TRL's side was left out: --env FOLDER makes and uses an environment with TRL 1.12.0")


def print_beyond(more: dict[str, int]) -> None:
    """Print what PPO holds beyond GRPO."""
    print("what PPO holds beyond GRPO:")
    for part, label in (ALWAYS | PASSING).items():
        print(f"  {label:<50}{more[part] / 1e6:8.2f} MB")
    for key, label in {"between_steps": "together between steps", "in_update": "together in the update"}.items():
        print(f"  {label:<50}{more[key] / 1e6:8.2f} MB, measured {more[f'{key}_measured'] / 1e6:.2f} MB")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    work = options().parse_args(arguments)
    if work.side:
        run_side(work)
        return
    if work.repeats < 1:
        raise SystemExit(f"--repeats: got {work.repeats}; at least one step has to be timed")
    found = measure(work, arguments, lambda text: print(text, file=sys.stderr, flush=True))
    if not work.json:
        print_table(found, work)
        return
    kept = {k: v for k, v in vars(work).items() if k not in ("json", "side")}
    more = {"ratios": ratios(found), "bounds": verdicts(found), "beyond_grpo_bytes": beyond_grpo(found)}
    result = {"work": kept, "load_average": os.getloadavg()[0], **found, **more}
    print(json.dumps(result, indent=2, default=str))


if __name__ == "__main__":
    main()
