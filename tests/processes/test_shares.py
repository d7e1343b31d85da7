"""How work is divided, arguments without an option, and what unlike cards agree on; no process is begun."""

from dataclasses import asdict

import pytest
from tiny_runs import save_tiny_chat_model, tiny_recipe

from lowmem_rlhf.engine.packing import Group, own_groups
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.processes.launch import without_option
from lowmem_rlhf.processes.shares import even, shared_out
from lowmem_rlhf.processes.world import World
from lowmem_rlhf.session import processes


@pytest.mark.parametrize(
    ("costs", "proportions", "expected"),
    [
        ([5, 5, 5, 5], even(2), [range(0, 2), range(2, 4)]),
        ([9, 1, 1, 1], even(2), [range(0, 1), range(1, 4)]),
        ([7], even(3), [range(0, 0), range(0, 1), range(1, 1)]),
        ([], even(2), [range(0, 0), range(0, 0)]),
        ([0, 0, 0, 0], even(2), [range(0, 2), range(2, 4)]),
        ([1] * 8, (0.75, 0.25), [range(0, 6), range(6, 8)]),
    ],
)
def test_items_go_to_the_process_in_whose_part_their_middle_lies(costs, proportions, expected):
    assert shared_out(costs, proportions) == expected


def test_shares_are_within_an_item_of_their_proportion():
    costs, proportions = [(37 * i) % 101 + 1 for i in range(400)], (0.5, 0.3, 0.2)

    parts = shared_out(costs, proportions)

    assert [place for part in parts for place in part] == list(range(400))
    for part, proportion in zip(parts, proportions, strict=True):
        assert abs(sum(costs[place] for place in part) - proportion * sum(costs)) <= max(costs)


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


class Told(World):
    """The second of two processes, which is told what the first one has planned."""

    def gather(self, value):
        return [self.first.pop(0), value]


def test_unlike_cards_take_the_settings_of_the_smaller_one_and_shares_by_speed(tmp_path, monkeypatch):
    recipe = tiny_recipe(save_tiny_chat_model(tmp_path / "model"), hardware={"quantization": "auto"})
    small = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update={"quantization": "nf4"})})
    plan, world = running_plan(recipe), Told(1, 2, even(2))
    assert plan.settings.quantization == "none"
    world.first = [(asdict(running_plan(small).settings), "another card", "cuda:0"), 3.0]  # and the seconds of a step
    monkeypatch.setattr(processes, "begun", lambda: world)

    agreed, told = processes.plan_of_processes(recipe, plan)

    assert agreed.settings.quantization == "nf4"
    assert agreed.reasons["quantization"] == "as process 0 on another card takes it"
    assert not world.alike
    own = agreed.time.step
    assert world.proportions == pytest.approx((own / (own + 3.0), 3.0 / (own + 3.0)))
    assert [one["name"] for one in told["processes"]] == ["another card", plan.device.name]
    assert [one["share"] for one in told["processes"]] == list(world.proportions)
