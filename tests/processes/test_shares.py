"""How work is divided, arguments without an option, and what unlike cards agree on; no process is begun."""

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from lowmem_rlhf.engine.packing import Group, own_groups
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.run_plan import plan_recipe, planned_device
from lowmem_rlhf.processes.launch import without_option
from lowmem_rlhf.processes.shares import even, proportions, shared_out, whole_shared_out, whole_shares
from lowmem_rlhf.processes.start import agreed_name
from lowmem_rlhf.processes.world import World, _shared_by
from lowmem_rlhf.progress import Silence
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.sections import TrainingConfig
from lowmem_rlhf.session import processes
from lowmem_rlhf.training.optimizer import Optimizer
from lowmem_rlhf.training.relayed import RelayedMessages


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([5, 5, 5, 5], even(2), [range(0, 2), range(2, 4)]),
        ([9, 1, 1, 1], even(2), [range(0, 1), range(1, 4)]),
        ([7], even(3), [range(0, 0), range(0, 1), range(1, 1)]),
        ([], even(2), [range(0, 0), range(0, 0)]),
        ([0, 0, 0, 0], even(2), [range(0, 2), range(2, 4)]),
        ([1] * 8, (0.75, 0.25), [range(0, 6), range(6, 8)]),
    ],
)
def test_items_go_to_the_process_in_whose_part_their_middle_lies(costs, parts, expected):
    assert shared_out(costs, parts) == expected


def test_shares_are_within_an_item_of_their_proportion():
    costs, wanted = [(37 * i) % 101 + 1 for i in range(400)], (0.5, 0.3, 0.2)

    parts = shared_out(costs, wanted)

    assert [place for part in parts for place in part] == list(range(400))
    for part, proportion in zip(parts, wanted, strict=True):
        assert abs(sum(costs[place] for place in part) - proportion * sum(costs)) <= max(costs)


def test_whole_items_are_as_many_as_the_plan_says_and_unequal_ones_go_by_their_costs():
    for count, speeds in ((8, (1, 1)), (5, (1, 1)), (2, (3, 1)), (8, (3, 5)), (1, (1, 1, 1)), (7, (2, 3, 4))):
        parts = whole_shared_out([96] * count, proportions(speeds))
        assert [len(part) for part in parts] == whole_shares(count, proportions(speeds))
        assert [place for part in parts for place in part] == list(range(count))
    assert whole_shared_out([300, 100, 100, 100], even(2)) == [range(0, 1), range(1, 4)]
    assert whole_shared_out([], even(2)) == [range(0, 0), range(0, 0)]


def test_proportions_are_those_of_the_speeds_and_sum_to_one():
    assert proportions([3.0, 1.0]) == [0.75, 0.25] and proportions([7.0]) == [1.0]
    assert math.fsum(proportions([0.1, 0.2, 0.3, 1e9])) == pytest.approx(1, abs=1e-15)
    for wrong in ([], [1.0, 0.0], [1.0, -1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="positive"):
            proportions(wrong)


@pytest.mark.parametrize(
    ("count", "speeds", "expected"),
    [(8, (1, 1), [4, 4]), (5, (1, 1), [3, 2]), (2, (3, 1), [2, 0]), (8, (3, 5), [3, 5]), (1, (1, 1, 1), [1, 0, 0])],
)
def test_whole_pieces_go_to_who_is_done_first(count, speeds, expected):
    assert whole_shares(count, proportions(speeds)) == expected


def test_no_other_way_to_share_out_whole_pieces_is_done_sooner():
    for speeds in ((1.0, 1.7), (2.0, 3.0, 4.5), (1.0, 1.0, 9.0)):
        for count in range(1, 7):
            shares = whole_shares(count, proportions(speeds))
            ways = (way for way in product(range(count + 1), repeat=len(speeds)) if sum(way) == count)
            soonest = min(max(one / speed for one, speed in zip(way, speeds, strict=True)) for way in ways)
            took = max(one / speed for one, speed in zip(shares, speeds, strict=True))
            assert sum(shares) == count and took == pytest.approx(soonest), (speeds, count)


def test_groups_are_divided_by_their_tokens_and_a_cut_one_keeps_its_prompt():
    groups = [Group([1, 2], [[3] * 9, [4] * 2, [5] * 2], [0, 1, 2]), Group([6], [[7, 8]], [3])]

    first, second = (own_groups(groups, World(rank, 2, even(2))) for rank in (0, 1))

    assert first == [Group([1, 2], [[3] * 9], [0])]
    assert second == [Group([1, 2], [[4] * 2, [5] * 2], [1, 2]), Group([6], [[7, 8]], [3])]
    assert own_groups(groups, World()) is groups


def test_an_option_is_taken_out_with_its_value():
    given = ["train", "x", "--processes", "2", "--output", "here", "a=b"]

    assert without_option("--processes", given) == ["train", "x", "--output", "here", "a=b"]
    assert without_option("--processes", ["train", "--processes=2", "x"]) == ["train", "x"]


def test_processes_meet_under_a_new_name_whatever_earlier_ones_left_in_the_store():
    store, names = HashStore(), []
    for size in (3, 2, 3):  # a node is lost, and comes back
        with ThreadPoolExecutor(size) as pool:
            ranks = reversed(range(size))  # the first process comes last
            found = [pool.submit(agreed_name, store, rank, size, timedelta(seconds=60)) for rank in ranks]
            same = {one.result() for one in found}
        assert len(same) == 1
        names += same

    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="process 1 does not answer"):
        agreed_name(store, 0, 2, timedelta(seconds=0.1))
    with pytest.raises(RuntimeError, match="process 0 does not answer"):
        agreed_name(store, 1, 2, timedelta(seconds=0.1))


def test_the_first_process_shows_what_others_alone_have_said():
    shown, silent = [], []
    first, second = RelayedMessages(Shows(shown)), RelayedMessages(Shows(silent))
    first.message("both say this")
    for line in ("both say this", "memory ran out", "memory ran out"):
        second.message(line)

    second.tell(Passed(1, 2, even(2), said=[["both say this"], ["both say this", *["memory ran out"] * 2]]))
    first.tell(Passed(0, 2, even(2), said=[["both say this"], ["both say this", *["memory ran out"] * 2]]))

    assert shown == ["both say this", "process 1: memory ran out"]
    assert silent == ["both say this", "memory ran out", "memory ran out"]


class Shows(Silence):
    def __init__(self, shown):
        self.message = shown.append


class Passed(World):
    """Processes whose values are known."""

    def __init__(self, *about, said):
        super().__init__(*about)
        self.said = said

    def gather(self, value):
        assert value == self.said[self.rank]
        return self.said


def test_a_loss_of_ones_own_that_is_not_finite_in_one_process_is_left_out_in_all():
    parameters = {"weight": torch.nn.Parameter(torch.ones(2, dtype=torch.float32, device="cpu"))}
    training = TrainingConfig(learning_rate=0.1)
    optimizer = Optimizer(parameters, training, "adamw", 3, torch.device("cpu"), scale_loss=False)
    optimizer.zero_grad()
    with _shared_by(Passed(0, 2, even(2), said=[True, False])):
        assert math.isnan(optimizer.step(1.0))
    assert (optimizer.skipped, optimizer.taken) == (1, 0)


class Told(World):
    """The second of two processes, which is told of the first one's card."""

    def gather(self, value):
        return [((profile_device(find_profile("rtx-2080-ti")), "rtx-2080-ti"), "here"), value]


def test_unlike_cards_agree_on_the_base_and_get_shares_by_speed(monkeypatch):
    recipe = load_recipe("grpo_gsm8k", ["hardware.profile=rtx-3090", "model=Qwen/Qwen2.5-0.5B-Instruct"])
    world = Told(1, 2, even(2))
    monkeypatch.setattr(processes, "begun", lambda: world)
    monkeypatch.setattr(processes, "running_device", planned_device)

    plan, told = processes.run_plan_of(recipe, Path("runs/none"), resume=False)

    alone = plan_recipe(recipe)
    assert (alone.settings.compute_dtype, plan.settings.compute_dtype) == ("bfloat16", "float16")
    assert plan.reasons["compute_dtype"].startswith("as one process would take it on the smallest card")
    assert not world.alike
    assert sum(world.proportions) == pytest.approx(1)
    assert world.proportions[1] > 0.55
    assert [one["share"] for one in told["processes"]] == list(world.proportions)
    assert [one["name"] for one in told["processes"]] == [
        profile_device(find_profile(name)).name for name in ("rtx-2080-ti", "rtx-3090")
    ]
