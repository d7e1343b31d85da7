"""What `plan --processes` prints: a column for cards that do the same, what is sent, and how much faster it gets."""

import io
import json

from rich.console import Console

import lowmem_rlhf as lm
from lowmem_rlhf.display.processes import print_plans
from lowmem_rlhf.display.tables import print_plan
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.processes.plan import plan_processes
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.recipe.loading import load_recipe

ROWS = [{"question": f"{n} + 1", "answer": f"{n + 1}"} for n in range(8)]


def printed(values: dict, printer=print_plans) -> str:
    out = io.StringIO()
    printer(values, Console(file=out, width=140))
    return out.getvalue()


def together(*profiles: str, machines: int = 1, changes: tuple[str, ...] = ()) -> str:
    cards = [(profile_device(find_profile(name)), name) for name in profiles]
    network = 10.0 if machines > 1 else None
    recipe = load_recipe("grpo_gsm8k", changes, quiet=True)
    return printed(json.loads(json.dumps(plan_processes(recipe, cards, machines, network).to_dict())))


def cells(text: str, row: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{row}  ")]
    return [cell.strip() for cell in line.removeprefix(row).split("  ") if cell.strip()]


def test_cards_that_differ_have_a_column_each():
    text = together("rtx-2080-ti", "rtx-3090", "rtx-3090")
    assert text.splitlines()[0] == (
        "3 processes in one machine, one a card: predicted; no run on several cards stands behind it"
    )
    assert cells(text, "card") == ["GeForce RTX 2080 Ti (11 GB)", "GeForce RTX 3090 (24 GB)"]
    assert cells(text, "process") == ["0", "1 to 2"]
    assert cells(text, "prompts of a step") == ["2 of 8", "3 of 8"]
    shares = [float(cell.removesuffix(" %")) for cell in cells(text, "tokens of the update")]
    assert abs(shares[0] + 2 * shares[1] - 100) < 0.2
    for row in ("weights", "memory: update, with these", "time: rollout", "sent a step"):
        assert len(cells(text, row)) == 2, row
    assert "fits on every card" in text and "times as fast as one GeForce RTX 3090 (24 GB)" in text
    assert "every process has the same base" in text and "communication" in text


def test_cards_that_are_alike_share_a_column():
    text = together(*["rtx-3090"] * 8, machines=2)
    assert cells(text, "process") == ["each of 8"] and cells(text, "prompts of a step") == ["1 of 8"]
    assert "from each machine to the next: 59 MiB" in text and "between machines 10 Gbit/s" in text
    assert "gradients 59 MiB, samples 280 KiB" in text


def test_a_shared_base_says_what_it_gathers():
    changes = ("model=Qwen/Qwen3-14B", "hardware.shard_base=true", "hardware.offload_base=true")
    text = together("rtx-2070", "rtx-2070", changes=changes)
    assert cells(text, "memory: gathered layers") and cells(text, "in host memory")
    assert "gathering layers takes" in text and "speed-up: no one card of these holds the run" in text


def test_what_does_not_fit_has_no_time():
    text = together("rtx-2070", "rtx-2070", changes=("model=Qwen/Qwen3-14B",))
    assert "does not fit on every card" in text and ": too much" in text and "speed-up" not in text


def test_one_process_is_shown_as_ever():
    values = plan_recipe(load_recipe("grpo_gsm8k", ["hardware.profile=rtx-3090"], quiet=True)).to_dict()
    assert printed(values) == printed(values, print_plan)


def test_the_python_api_plans_processes():
    view = lm.plan("grpo_gsm8k", profile="rtx-3090", data=ROWS, overrides=["data.eval_size=2"], processes=2)
    assert view.fits and view.values["processes"]["count"] == 2 and view.advice == ""
    assert "each of 2" in repr(view)
    unlike = lm.plan("grpo_gsm8k", profile="rtx-3090, T4", data=ROWS, overrides=["data.eval_size=2"], processes=2)
    assert [one["profile"] for one in unlike.values["processes"]["cards"]] == ["rtx-3090", "t4"]
