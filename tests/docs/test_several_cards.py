"""The tables of docs/several-cards.md are what its commands print, and what it says of a plan is there."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from lowmem_rlhf.planning.processes.request import cluster_of, plan_of
from lowmem_rlhf.planning.processes.values import ProcessesPlan
from lowmem_rlhf.recipe.loading import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "several-cards.md").read_text(encoding="utf-8")


def tables() -> list[tuple[str, dict[str, list[str]]]]:
    """Return each table of figures: the command before it, and its rows by their first cell."""
    found = []
    for command, rows in re.findall(r"\(`lowmem-rlhf plan ([^`]+)`.*?\):\n\n((?:\|[^\n]*\n)+)", PAGE, re.DOTALL):
        cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in rows.splitlines()]
        head, *body = cells[:1] + cells[2:]
        found.append((command, {"options": [cell.strip("`") for cell in head[1:]], **{r[0]: r[1:] for r in body}}))
    return found


def planned(command: str) -> ProcessesPlan:
    words = shlex.split(command)
    flags = {word.removeprefix("--"): value for word, value in pairwise(words) if word[:2] == "--"}
    changes = [word for word in words[1:] if "=" in word]
    cluster = cluster_of(
        int(flags["processes"]), int(flags["machines"]) if "machines" in flags else None, None, flags["profile"]
    )
    made = plan_of(load_recipe(words[0], changes, quiet=True), cluster)
    assert isinstance(made, ProcessesPlan)
    return made


@pytest.mark.parametrize("table", tables(), ids=lambda table: table[0].split()[1])
def test_a_table_is_what_the_plan_says(table):
    command, rows = table
    for column, options in enumerate(rows["options"]):
        made = planned(f"{command} {options}")
        one, time = made.processes[0], made.time
        assert time is not None
        said = {
            "prompts of a process": str(one.prompts),
            "completions at once": str(one.plan.settings.rollout_batch_size),
            "peak of a card": f"{one.plan.memory['peak_bytes'] / 2**30:.2f} GiB",
            **{name: f"{float(f'{seconds:.3g}'):g} s" for name, seconds in time.phases.items()},
            "a step": f"{time.step:.3g} s",
            "sent by a machine": f"{made.traffic.total / 2**20:.0f} MiB" if made.machines > 1 else "",
            "speed-up": f"{made.speed_up:.2f}" if made.speed_up else "",
        }
        unit, name = (2**30, "GiB") if made.traffic.layers else (2**20, "MiB")
        said["sent by a process"] = f"{made.traffic.total / unit:.0f} {name}"
        for row, cells in rows.items():
            if row != "options":
                assert cells[column] == said[row], (options, row)


def test_both_tables_are_read():
    assert [len(rows) for _, rows in tables()] == [11, 7]
    assert "159 s a step" in " ".join(PAGE.split())
    alone = planned(f"{tables()[0][0]} --processes 2").alone
    assert alone is not None and f"{alone.step:.0f}" == "159"
