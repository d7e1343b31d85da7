"""The plan of several processes: shares, what they send, memory and time by hand, and what they agree on."""

import json
import math
from dataclasses import replace

import pytest
from planning_cases import card, cpu
from processes_cases import QWEN, dims, named, planned, recipe_of

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.planning import run_plan
from lowmem_rlhf.planning.memory.resident import Memory
from lowmem_rlhf.planning.plan import Plan, plan_for
from lowmem_rlhf.planning.processes.plan import plan_processes
from lowmem_rlhf.planning.processes.request import advice_of, cards_of, cluster_of, plan_of
from lowmem_rlhf.planning.processes.traffic import bytes_sent, sample_bytes
from lowmem_rlhf.planning.processes.values import PREDICTED
from lowmem_rlhf.planning.run_plan import plan_recipe
from lowmem_rlhf.planning.time.links import COLLECTIVE, HOP, NETWORK_HOP, Ring, sent_gathering, sent_summing

# what is sent


def test_bytes_in_a_ring_by_hand():
    assert (sent_gathering(1000, 4), sent_summing(1000, 4)) == (750, 1500)
    assert (sent_gathering(1000, 1), sent_summing(1000, 1)) == (0, 0)
    ring = Ring(4, 1e9, 5e-6)
    assert ring.gathering(4e6, 10) == pytest.approx(3e6 / 1e9 + 10 * (COLLECTIVE + 3 * 5e-6))
    assert ring.summing(4e6) == pytest.approx(6e6 / 1e9 + COLLECTIVE + 6 * 5e-6)


def test_what_a_step_sends_by_hand():
    recipe = recipe_of("training.prompts_per_step=6", "generation.num_generations=4", "grpo.beta=0")
    tokens = recipe.generation.max_completion_length
    # an id of 8 bytes, the log-prob at which a token was sampled, the reference's of one in four; two rewards
    assert len(recipe.rewards) == 2 and sample_bytes(recipe) == 24 * (tokens * (8 + 4 + 1) + 4 * 2)
    with_reference = recipe_of("training.prompts_per_step=6", "generation.num_generations=4", "grpo.beta=0.04")
    assert sample_bytes(with_reference) == sample_bytes(recipe) + 24 * tokens * 3
    ppo = recipe_of("training.prompts_per_step=6", name="ppo_reward_adapter")
    count, length = 6 * ppo.generation.num_generations, ppo.generation.max_completion_length
    assert sample_bytes(ppo) == count * (length * (8 + 4 * 4) + 4 * len(ppo.rewards))
    assert sample_bytes(recipe_of(name="sft_chat")) == 0
    settings = plan_recipe(recipe_of("hardware.profile=rtx-3090")).settings
    memory = Memory(dims(), recipe, settings, card(20, bf16=True))
    sent = bytes_sent(recipe, memory, 4)
    assert sent.gradients == 2 * 3 * 4 * dims().lora_parameters(16) // 4
    assert (sent.samples, sent.layers) == (round(sample_bytes(recipe) * 3 / 4), 0)
    assert sent.total == sent.gradients + sent.samples == sent.to_dict()["total"]


def test_every_optimizer_step_and_every_trained_adapter_sends_its_gradients():
    def sent(*changes):
        made = recipe_of(*changes, name="ppo_reward_adapter")
        return bytes_sent(made, Memory(dims(), made, settings, card(20, bf16=True)), 2).gradients

    settings = plan_recipe(recipe_of("hardware.profile=rtx-3090", name="ppo_reward_adapter")).settings
    both = 4 * 2 * dims().lora_parameters(16)  # fp32, of policy and critic
    recipe = recipe_of(name="ppo_reward_adapter")
    assert recipe.model == QWEN
    assert sent() == recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches * both
    assert sent("ppo.critic=policy", "ppo.num_ppo_epochs=1", "ppo.num_mini_batches=1") == both // 2


def test_more_processes_send_more_each_and_less_than_twice_the_gradients():
    sent = [planned(*["rtx-3090"] * count).traffic for count in (2, 4, 8)]
    whole = 4 * dims().lora_parameters(16)
    assert [one.gradients for one in sent] == [round(2 * (n - 1) / n * whole) for n in (2, 4, 8)]
    assert sent[0].samples < sent[1].samples < sent[2].samples and sent[2].gradients < 2 * whole


# the plan


def test_one_process_has_the_plain_plan():
    recipe = recipe_of("hardware.profile=rtx-2080-ti")
    assert cluster_of(1, None, None, None) is None and cluster_of(None, None, None, "rtx-3090") is None
    made = plan_of(recipe, cluster_of(1, 1, None, None))
    assert isinstance(made, Plan) and made == plan_recipe(recipe)
    assert advice_of(made, recipe, None) == ""


def test_like_cards_have_the_plan_of_their_share():
    made = planned("rtx-3090", "rtx-3090")
    recipe = recipe_of("training.prompts_per_step=4", "data.eval_size=128")
    assert recipe_of().training.prompts_per_step == 8 and recipe_of().data.eval_size == 256
    alone = plan_for(recipe, *named("rtx-3090")[0], dims())
    for process in made.processes:
        assert replace(process.plan, time=None) == replace(alone, time=None) and process.plan.time == alone.time
        assert (process.share, process.prompts, process.machine) == (0.5, 4, 0)
    assert made.time and made.communication and made.alone and made.speed_up
    assert made.time.phases == {**alone.time.phases, "communication": made.communication}
    assert made.time.step == pytest.approx(alone.time.step + made.communication)
    gradients, samples = 4 * dims().lora_parameters(16), sample_bytes(recipe_of())
    sent = (gradients + samples / 2) / 12e9  # an all-reduce of two sends its bytes once
    assert made.communication == pytest.approx(sent + 3 * COLLECTIVE + 4 * HOP)
    whole = plan_for(recipe_of(), *named("rtx-3090")[0], dims())
    assert made.alone.step == whole.time.step and made.speed_up == whole.time.step / made.time.step
    assert 1 < made.speed_up < 2 and made.warnings == () and made.gathering == 0
    low, high = made.time.step_range
    assert low < made.time.step < high
    steps, times = made.time.steps, made.time.evaluations
    assert made.time.run == pytest.approx(steps * made.time.step + times * made.time.evaluation)


def test_unlike_cards_have_one_base_and_shares_by_their_speed():
    made = planned("rtx-2080-ti", "rtx-3090")
    small, large = made.processes
    for key in ("quantization", "compute_dtype", "optim", "lora"):
        assert getattr(small.plan.settings, key) == getattr(large.plan.settings, key)
    assert large.plan.settings.compute_dtype == "float16"  # alone it would take bfloat16
    assert "GeForce RTX 2080 Ti" in large.plan.reasons["compute_dtype"]
    assert small.share + large.share == pytest.approx(1) and small.prompts + large.prompts == 8
    ratio = large.tokens_per_second / small.tokens_per_second
    assert large.share / small.share == pytest.approx(ratio) and ratio > 1.1 and large.prompts > small.prompts
    assert large.plan.settings.rollout_batch_size == 8 * large.prompts
    assert set(large.plan.reasons) == set(small.plan.reasons)
    (said,) = made.warnings
    assert "GeForce RTX 2080 Ti (11 GB) has no bfloat16" in said
    # both are done with the update at about the same time, whatever prompts they had
    updates = [process.phases["update"] for process in made.processes]
    assert max(updates) < 1.25 * min(updates)
    slower = max(made.processes, key=lambda one: one.phases["rollout"] + one.phases["score"])
    assert made.time.phases["rollout"] == slower.phases["rollout"]
    assert made.time.phases["update"] == max(updates)


def test_the_smallest_card_decides_the_format_of_the_base():
    made = planned("rtx-2070", "rtx-4090", changes=("model=Qwen/Qwen2.5-3B-Instruct",))
    assert [one.plan.settings.quantization for one in made.processes] == ["nf4", "nf4"]
    alone = plan_recipe(recipe_of("model=Qwen/Qwen2.5-3B-Instruct", "hardware.profile=rtx-4090"))
    assert alone.settings.quantization == "none"
    assert "GeForce RTX 2070" in made.processes[1].plan.reasons["quantization"]
    small, large = (one.plan.settings for one in made.processes)
    assert (small.optim, small.lora) == (
        large.optim,
        large.lora,
    ) and large.rollout_batch_size > small.rollout_batch_size


def test_the_format_of_the_base_does_not_depend_on_how_many_processes_there_are():
    changes = ("model=Qwen/Qwen2.5-7B-Instruct", "training.prompts_per_step=32")
    made = planned(*["rtx-3090"] * 8, changes=changes)
    share = recipe_of(changes[0], "training.prompts_per_step=4", "hardware.profile=rtx-3090")
    assert plan_recipe(share).settings.quantization == "nf4"  # what a run of this size would take
    alone = plan_recipe(recipe_of(*changes, "hardware.profile=rtx-3090")).settings
    ours = made.processes[0].plan.settings
    assert ours.quantization == alone.quantization == made.alone.quantization == "none"
    assert ours.rollout_batch_size == 32 and made.warnings == ()


def test_a_process_without_a_prompt_takes_part_in_the_update_only():
    made = planned(*["rtx-3090"] * 4, changes=("training.prompts_per_step=2",))
    assert [one.prompts for one in made.processes] == [1, 1, 0, 0]
    idle, busy = made.processes[3], made.processes[0]
    assert idle.phases["rollout"] == idle.phases["score"] == 0 < idle.phases["update"]
    assert idle.phases["update"] == busy.phases["update"]
    assert made.warnings[0].startswith("processes 2 and 3 have no prompt of a step's 2")
    uneven = planned(*["rtx-3090"] * 3, changes=("training.prompts_per_step=4",))
    assert "take a multiple of 3" in uneven.warnings[0]
    assert uneven.processes[0].phases["update"] == pytest.approx(uneven.processes[2].phases["update"], rel=0.2)


def test_the_network_is_the_slowest_link_of_two_machines():
    one, two = (planned(*["rtx-3090"] * 4, machines=machines, network=net) for machines, net in ((1, None), (2, 10.0)))
    assert [process.machine for process in two.processes] == [0, 0, 1, 1]
    assert one.traffic == two.traffic
    bytes_ = one.traffic.gradients + one.traffic.samples
    assert one.communication == pytest.approx(bytes_ / 12e9 + 3 * COLLECTIVE + 12 * HOP, rel=1e-6)
    assert two.communication == pytest.approx(bytes_ / 1.25e9 + 3 * COLLECTIVE + 12 * NETWORK_HOP, rel=1e-6)
    assert one.time.phases["rollout"] == two.time.phases["rollout"] and two.speed_up < one.speed_up
    values = two.to_dict()["processes"]
    assert values["sent_to_next_machine_bytes"] == two.traffic.total and values["network_gbit"] == 10.0
    assert any("10 Gbit/s" in said for said in two.assumptions) and "PCIe" in one.assumptions[0]


def test_processes_on_a_cpu_share_its_memory_and_cores():
    device = replace(cpu(32), cores=8)
    made = plan_processes(recipe_of(), [(device, "cpu")] * 4)
    assert {(one.plan.device.free_bytes, one.plan.device.cores) for one in made.processes} == {(8 * 2**30, 2)}
    (note,) = made.processes[0].plan.device.notes
    assert note == "4 processes share the memory and the cores of this CPU"
    two = plan_processes(recipe_of(), [(device, "cpu")] * 4, 2, 10.0)
    assert two.processes[0].plan.device.free_bytes == 16 * 2**30


def test_what_is_not_timed_is_planned_and_shared_out_evenly():
    unknown = [(card(20, bf16=True), "x"), (card(10, bf16=True), "y")]
    made = plan_processes(recipe_of(), unknown)
    assert made.time is made.alone is made.speed_up is made.communication is None
    assert [one.share for one in made.processes] == [0.5, 0.5] and "equal shares" in made.warnings[-1]
    assert made.traffic.gradients == 4 * dims().lora_parameters(16)
    trl = plan_processes(recipe_of(name="dpo"), named("rtx-3090", "rtx-3090"))
    assert trl.fits and trl.time is None and trl.processes[0].prompts == 8


def test_json_has_all_that_a_plan_has_and_the_processes():
    made = planned("rtx-2080-ti", "rtx-3090")
    values = json.loads(json.dumps(made.to_dict()))
    plain = plan_recipe(recipe_of("hardware.profile=rtx-3090")).to_dict()
    assert set(values) == set(plain) | {"processes"} and set(values["settings"]) == set(plain["settings"])
    assert values["device"] == json.loads(json.dumps(made.tightest.plan.device.to_dict()))
    together = values["processes"]
    assert set(together) == {
        *("predicted", "count", "machines", "network_gbit", "cards", "sent_bytes", "sent_to_next_machine_bytes"),
        *("communication_seconds", "gathering_seconds", "alone", "speed_up", "assumptions", "warnings"),
    }
    assert together["predicted"] == PREDICTED and together["count"] == len(together["cards"]) == 2
    assert set(together["cards"][0]) == {
        *("machine", "share", "prompts", "tokens_per_second", "phases", "fits", "verdict", "device", "profile"),
        *("settings", "reasons", "memory"),
    }
    assert set(together["sent_bytes"]) == {"gradients", "samples", "layers", "total"}
    assert values["time"]["step_seconds"] == sum(values["time"]["phases"].values())
    assert values["fits"] == all(one["fits"] for one in together["cards"])


# what is asked for


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((0, None, None, None), "processes: got 0; give 1 or more"),
        ((-2, None, None, None), "processes: got -2"),
        ((None, 2, None, None), "machines: got 2, which is for several processes"),
        ((None, None, 10.0, None), "network: got 10, which is for several processes"),
        ((None, None, None, "rtx-3090,rtx-3090"), "profile: got 2 cards, but one process is planned"),
        ((4, 3, None, None), "machines: got 3, among which 4 processes cannot be divided evenly"),
        ((4, 0, None, None), "machines: got 0"),
        ((4, 2, 0.0, None), "network: got 0; give"),
        ((4, 2, math.nan, None), "network: got nan"),
        ((4, None, 10.0, None), "network: got 10, but all processes are in one machine"),
        ((3, None, None, "rtx-3090,rtx-2080-ti"), "profile: got 2 cards for 3 processes"),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(asked, said):
    with pytest.raises(UserError, match=said) as error:
        cluster_of(*asked)
    assert "\n" not in str(error.value)


def test_a_card_without_any_room_is_the_one_that_is_named():
    recipe, cluster = recipe_of("hardware.vram=1MB"), cluster_of(2, None, None, "rtx-3090")
    made = plan_of(recipe, cluster)
    assert not made.fits and made.tightest.plan.memory["budget_bytes"] == 0
    assert "does not fit on GeForce RTX 3090" in advice_of(made, recipe, cluster)


def test_more_processes_than_rows_are_refused():
    small = recipe_of("training.prompts_per_step=1", "generation.num_generations=2")
    assert plan_of(small, cluster_of(2, None, None, "rtx-3090")).fits
    three = cluster_of(3, None, None, "rtx-3090")
    with pytest.raises(UserError, match="processes: got 3, but a step has only 2 completions; give at most 2"):
        plan_of(small, three)
    with pytest.raises(UserError, match="only 2 examples"):
        plan_of(recipe_of("training.prompts_per_step=2", name="sft_chat"), three)


def test_cards_are_those_of_this_machine_where_it_has_enough(monkeypatch):
    here = [replace(card(20, bf16=True), torch_device="cuda:0"), replace(card(10), torch_device="cuda:1")]

    def detect(name: str) -> Device:
        if name in ("auto", "cuda"):
            return here[0]
        if (number := int(name.removeprefix("cuda:"))) >= len(here):
            raise UserError("no such card")
        return here[number]

    monkeypatch.setattr("lowmem_rlhf.hardware.detect.detect", detect)
    monkeypatch.setattr(run_plan, "detect", detect)
    recipe = recipe_of()
    names = [[device.torch_device for device, _ in cards_of(recipe, cluster_of(*asked))] for asked in (
        (2, None, None, None), (4, 2, None, None), (3, None, None, None),
    )]  # fmt: skip
    assert names == [["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"] * 2, ["cuda:0"] * 3]
    one = cards_of(recipe_of("hardware.device=cuda:1"), cluster_of(2, None, None, None))
    assert [device.torch_device for device, _ in one] == ["cuda:1", "cuda:1"]
    smaller = cards_of(recipe_of("hardware.vram=8GB"), cluster_of(2, None, None, None))
    assert [device.total_bytes for device, _ in smaller] == [8 * 2**30] * 2
