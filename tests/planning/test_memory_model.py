"""The memory model by hand, its shapes against the packer, its layers against what autograd keeps.

Whole phases are held against live tensors of real steps in tests/benchmarks/test_vram_measured.py.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
from planning_cases import CONFIGS, card, cpu

from lowmem_rlhf.architecture.dimensions import ModelDimensions, dimensions_from_config
from lowmem_rlhf.planning import shapes
from lowmem_rlhf.planning.limits import tile_shape
from lowmem_rlhf.planning.memory import rollout as rollouts
from lowmem_rlhf.planning.memory.layers import Layer
from lowmem_rlhf.planning.memory.phases import ALLOCATOR_FACTOR, peak_phase, phases
from lowmem_rlhf.planning.memory.resident import (
    Memory,
    Settings,
    block_weight_bytes,
    embedding_bytes,
    logits_tile_bytes,
    total,
)
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.schema import Recipe

LORA = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear"}
SETTINGS = Settings("nf4", "float16", True, False, 4096, 4096, 64, "quantized", 64, "adamw", LORA)


def dims(name: str) -> ModelDimensions:
    return dimensions_from_config(CONFIGS[name], name)


def memory_of(*overrides: str, model: str = "Qwen2.5-0.5B", device=None, **settings) -> Memory:
    recipe = load_recipe("grpo_gsm8k", ["data.eval_size=0", *overrides])
    return Memory(dims(model), recipe, replace(SETTINGS, **settings), device or cpu(16))


def test_weights_by_hand():
    model = dims("Qwen2.5-0.5B")
    assert block_weight_bytes(model, "none", 2) == 2 * model.linear_parameters
    assert block_weight_bytes(model, "nf4", 2) / model.linear_parameters == pytest.approx(0.5 + 0.127 / 8, abs=1e-4)
    assert 1 < block_weight_bytes(model, "int8", 2) / model.linear_parameters < 1.005
    assert embedding_bytes(model, 2) == pytest.approx(151936 * 896 * 2, rel=0.002)  # tied: once
    assert embedding_bytes(dims("Qwen2.5-7B"), 2) / 2**30 == pytest.approx(2.03, abs=0.01)
    away = embedding_bytes(dims("Qwen2.5-7B"), 2) - embedding_bytes(dims("Qwen2.5-7B"), 2, offloaded=True)
    assert away == 152064 * 3584 * 2
    assert embedding_bytes(model, 2, offloaded=True) == embedding_bytes(model, 2)  # it is the head


def test_an_adapter_parameter_takes_sixteen_bytes_with_adamw():
    for optim, bytes_each in (("adamw", 16), ("adamw_8bit", 10.03)):
        one = memory_of(optim=optim)
        resident, gradients = one.resident(), one.update()["gradients"]
        parameters = one.one_adapter
        held = resident["adapters"] + resident["optimizer_state"] + gradients
        assert held == pytest.approx(bytes_each * parameters, rel=0.005)


def test_the_cache_holds_prompts_once():
    model = dims("Qwen2.5-1.5B")
    token = 2 * 28 * 2 * 128 * 2  # keys and values, layers, key heads, head size, bytes
    assert rollouts.kv_bytes_per_token(model, 2) == token
    lengths = ["data.max_prompt_length=512", "generation.max_completion_length=257", "training.prompts_per_step=8"]
    found = rollouts.rollout(memory_of(*lengths, model="Qwen2.5-1.5B"))
    assert found["kv_cache"] in (
        token * (8 * 512 + 64 * 256),
        token * (8 * 512 + 64 * 256) + round(token * 64 * 256 / 28),  # one layer's room grows
    )


@pytest.mark.parametrize("engine", ["continuous", "shared_prompt"])
def test_a_repetition_penalty_takes_a_mask_and_copies_of_the_logits(engine):
    """And nothing else does: with all of it off, the plan is what it was."""
    lengths = ["data.max_prompt_length=64", "generation.max_completion_length=64", f"generation.engine={engine}"]

    def found(*overrides: str):
        return memory_of(*lengths, *overrides, device=card(24), model="Qwen2.5-0.5B")

    off, on = found(), found("generation.repetition_penalty=1.2", "generation.min_new_tokens=4")
    vocabulary, rows = dims("Qwen2.5-0.5B").vocab_size, 64
    before, after = rollouts.rollout(off), rollouts.rollout(on)
    assert after.pop("seen_tokens") == rows * vocabulary and "seen_tokens" not in before
    assert after.pop("sampling_logits") - before.pop("sampling_logits") == 64 * vocabulary * (13 + 1 - 8)
    assert after == before
    assert rollouts.kept_bytes(on) - rollouts.kept_bytes(off) == rows * vocabulary * (1 + 6)
    assert rollouts.rollout(found("generation.stop_strings=[a]")) == rollouts.rollout(off)


SHAPES = [
    # prompt, fed, scored, generations, groups, tokens
    (64, 63, 64, 4, 2, 316),  # a group fills the row
    (64, 63, 64, 4, 2, 700),  # two groups, all there is
    (64, 63, 64, 4, 6, 948),  # three of six
    (64, 63, 64, 4, 2, 190),  # two of four completions, twice as many rows
    (64, 63, 64, 4, 2, 100),  # not even one: it is taken alone
    (400, 16, 17, 8, 2, 528),  # keys bound it: a prompt is read by each of its completions
    (500, 7, 8, 8, 2, 1128),  # what the keys' bound leaves of two groups makes the longer row
    (500, 7, 8, 8, 2, 4096),  # a bound that is larger than all there is
    (1, 510, 511, 1, 4, 1022),  # examples of supervised fine-tuning
]


@pytest.mark.parametrize(("prompt", "fed", "scored", "generations", "groups", "tokens"), SHAPES)
def test_a_row_is_no_less_than_what_the_packer_makes(prompt, fed, scored, generations, groups, tokens):
    from lowmem_rlhf.engine import packing

    shape = shapes.packed_shape(prompt, fed, scored, generations, groups, tokens)
    given = [
        packing.Group([1] * prompt, [[2] * (fed + 1) for _ in range(generations)], list(range(generations)))
        for _ in range(groups)
    ]
    batches = packing.split_groups(given, tokens)
    largest = max(sum(group.tokens for group in batch) for batch in batches)
    attended = max(sum(group.attended - len(group.prompt) for group in batch) for batch in batches)
    assert largest <= shape.tokens <= max(tokens, prompt + fed)
    assert attended <= shape.attended
    if len({len(batch) for batch in batches}) == 1 and largest in (tokens, groups * (prompt + generations * fed)):
        assert (shape.tokens, shape.attended) == (largest, attended)


def test_a_shape_by_hand():
    shape = shapes.packed_shape(prompt=64, fed=63, scored=64, generations=4, groups=2, tokens=316)
    assert shape == shapes.PackedShape(
        tokens=64 + 4 * 63,
        prompt_tokens=64,
        attended=4 * 127,
        scored=4 * 64,
        prompt_scores=64 * 64,
        own_scores=4 * 63 * 127,
        prompt_keys=64,
        own_keys=127,
        row_scores=63 * 127,
    )
    twice = shapes.packed_shape(prompt=64, fed=63, scored=64, generations=4, groups=2, tokens=632)
    assert (twice.tokens, twice.scored, twice.own_scores) == (632, 512, 2 * shape.own_scores)
    assert (twice.own_keys, twice.row_scores) == (shape.own_keys, shape.row_scores)  # of one completion


def test_a_layer_of_llama_by_hand():
    """Per token: input and norm (2h), x A^T (R / 2), queries, SDPA's result and the joined one; and the MLP's part."""
    h, f, q, kv, ranks, width = 576, 1536, 9 * 64, 3 * 64, 7 * 16, 2
    shape = shapes.packed_shape(prompt=400, fed=300, scored=301, generations=2, groups=1, tokens=1000)
    layer = Layer(dims("SmolLM2-135M"), shape, width, (16,) * 7, adapters=1, dense=0, explicit_scores=False, wide=False)
    attention = 1000 * (2 * h + ranks / 2 + q + q + q)
    attention += 2 * q * (400 + 2 * 700)  # keys and values, heads expanded: the prompt's, and each completion's
    mlp = 1000 * (2 * h + 3 * f + ranks / 2)
    assert layer.saved() == width * (attention + mlp) + 4 * 9 * 1000  # and the log-sum-exp
    assert layer.hidden == width * 1000 * h
    assert layer.backward_peak() > layer.saved() > layer.forward_peak() > layer.hidden
    alone = shapes.prompts_shape(200, 200)
    explicit = Layer(dims("SmolLM2-135M"), alone, width, (16,) * 7, 1, dense=0, explicit_scores=True, wide=False)
    on_card = replace(explicit, explicit_scores=False, wide=False)
    softmax = width * 9 * 200 * 200
    results = width * 200 * q + 4 * 9 * 200  # which SDPA keeps instead, and expanded keys and values
    assert explicit.saved() - on_card.saved() == softmax - results - width * 200 * 2 * (q - kv)


def test_an_export_needs_no_optimizer_and_never_decides_whether_a_run_fits():
    for model, algorithm in (("Qwen2.5-7B", "grpo"), ("SmolLM2-135M", "ppo")):
        recipe = load_recipe("grpo_gsm8k", [f"algorithm={algorithm}"])
        least = {"micro_batch_tokens": 832, "score_batch_tokens": 832, "rollout_batch_size": 1}
        tight = replace(SETTINGS, optim="adamw_8bit", lora={**LORA, "r": 4}, **least)
        found = phases(dims(model), recipe, tight, card(10.75))
        assert found["export"].keys() == {
            "weights", "embeddings", "adapters", "adapter_copies", "workspaces", "compared_logits", "allocator",
        }  # fmt: skip
        assert peak_phase(found)[0] != "export"


def test_cublas_keeps_a_workspace_for_each_of_two_threads():
    """Two of 32 MiB were seen on an H100, where a step of a tiny model held 67 to 68 MB."""
    for capability, each in (((7, 5), 8_519_680), ((8, 9), 8_519_680), ((12, 0), 8_519_680), ((9, 0), 2**25)):
        device = replace(card(10.75), compute_capability=capability)
        assert memory_of(device=device).resident()["workspaces"] == 2 * each
        assert memory_of(device=device).export()["workspaces"] == each
    assert memory_of(device=cpu(16)).resident()["workspaces"] == 0


def test_the_tile_has_the_heads_shape():
    import torch

    from lowmem_rlhf.engine import logprobs

    model = dims("Qwen2.5-0.5B")
    head = logprobs.Head(torch.nn.Linear(model.hidden_size, model.vocab_size, bias=False, device="meta"))
    for positions, tile in ((2000, 64), (2000, 1), (30, 64), (513, 512)):
        most, chunk = head.shape_of_tiles(positions, tile)
        rows = max(part.stop - part.start for part in logprobs.tiles(positions, most))
        assert logits_tile_bytes(model, positions, tile, 2, gradient=False, on_cpu=False) == rows * chunk * (2 + 8)
        rows_of_head = rows * model.hidden_size * (2 + 4)
        with_gradient = logits_tile_bytes(model, positions, tile, 2, gradient=True, on_cpu=False)
        assert with_gradient == rows * chunk * (2 + 8) + rows_of_head
    assert logits_tile_bytes(model, 0, 64, 2, gradient=True, on_cpu=False) == 0


@pytest.mark.parametrize(("name", "width"), [("float32", 4), ("bfloat16", 2)])
def test_an_entropy_gradient_takes_what_is_planned(name, width):
    import torch

    from lowmem_rlhf.engine.logprobs import Head, tiled_logprobs
    from lowmem_rlhf.hardware.live_bytes import LiveBytes

    positions, tile = 600, 64
    model = replace(dims("Qwen2.5-0.5B"), hidden_size=256, vocab_size=700)
    layer = torch.nn.Linear(256, 700, bias=False, dtype=getattr(torch, name)).requires_grad_(False)
    hidden = torch.randn((positions, 256), dtype=layer.weight.dtype, requires_grad=True)
    counter = LiveBytes()
    before = counter.current
    with counter:
        logps, entropies = tiled_logprobs(hidden, torch.arange(positions), Head(layer), 1.0, tile, entropy="gradient")
    forward = counter.peak - before
    counter.reset_peak()
    with counter:
        (logps + entropies).sum().backward()
    numbers = positions * 256
    states = logits_tile_bytes(model, positions, tile, width, gradient=True, on_cpu=True, entropy=True)
    assert 0.95 < forward / (2 * width * numbers + states) < 1.02
    assert 0.75 < (counter.peak - before) / ((3 * width + 8) * numbers) < 1.02


@pytest.mark.parametrize("vocabulary", [500, 32000, 151936])
@pytest.mark.parametrize("positions", [1, 40, 2000])
def test_a_card_takes_as_much_of_the_vocabulary_at_once_as_the_room_is_for(positions, vocabulary):
    for tile in (1, 16, 64, 1024):
        rows, entries = tile_shape(positions, tile, vocabulary, on_cpu=False)
        few_rows, few = tile_shape(positions, tile, vocabulary, on_cpu=True)
        assert rows <= few_rows <= positions and few <= entries <= vocabulary and few <= 4096
        assert rows * entries <= max(tile * vocabulary, min(vocabulary, 4096))
        whole = entries == vocabulary
        assert whole or rows * (entries + 256) > tile * vocabulary or entries == 4096


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "sft"])
def test_a_recomputed_layer_more_never_takes_more(algorithm):
    def update(checkpointing: bool | int) -> int:
        more = ["rewards=[]", "data.completion=answer", "data.answer=null"] if algorithm == "sft" else []
        return total(memory_of(f"algorithm={algorithm}", *more, gradient_checkpointing=checkpointing).update())

    sizes = [update(count) for count in range(25)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[-1]
    assert (update(False), update(True)) == (sizes[0], sizes[-1])


@pytest.mark.parametrize("model", CONFIGS)
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "sft", "reward_model"])
@pytest.mark.parametrize("device", [cpu(16), card(10.75)], ids=["cpu", "card"])
def test_more_tokens_rows_or_length_never_take_less(model, algorithm, device):
    more = ["data.max_prompt_length=128", "generation.max_completion_length=100"]
    if algorithm in ("sft", "reward_model"):
        more += ["rewards=[]", "data.answer=null", *(["data.completion=x"] if algorithm == "sft" else [])]
    recipe = load_recipe("grpo_gsm8k", [f"algorithm={algorithm}", *more])

    def sizes(found: Recipe = recipe, **settings) -> dict[str, int]:
        by_phase = phases(dims(model), found, replace(SETTINGS, **settings), device)
        return {name: total(components) for name, components in by_phase.items()}

    def grows(points: list[dict[str, int]]) -> None:
        for less, more in pairwise(points):
            assert all(
                more[phase] >= 0.98 * less[phase] for phase in less
            )  # tiles divide positions more or less evenly

    grows([sizes(micro_batch_tokens=tokens, score_batch_tokens=tokens) for tokens in range(228, 6000, 333)])
    grows([sizes(gradient_checkpointing=count) for count in range(dims(model).num_layers, -1, -1)])
    grows([sizes(rollout_batch_size=rows) for rows in (1, 2, 4, 8, 16, 64)])
    grows([sizes(logits_tile_tokens=tile) for tile in (1, 16, 64, 512)])
    grows([sizes(lora={**LORA, "r": r}) for r in (4, 8, 16, 64)])
    if algorithm in ("grpo", "ppo"):  # a packed row is as large whatever the lengths in it
        lengths = [recipe.generation.model_copy(update={"max_completion_length": n}) for n in (20, 40, 80, 160, 300)]
        found = [sizes(recipe.model_copy(update={"generation": length})) for length in lengths]
        grows([{"rollout": one["rollout"]} for one in found])


def test_a_layer_keeps_what_is_predicted():
    """Tensors that autograd keeps for one more layer of a packed pass, counted by storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lowmem_rlhf.engine.attention import PackedContext
    from lowmem_rlhf.engine.base import SharedBase
    from lowmem_rlhf.engine.packing import Group, pack

    fields = {key: value for key, value in CONFIGS["SmolLM2-135M"].items() if key != "model_type"} | {"vocab_size": 512}
    shape = shapes.packed_shape(prompt=64, fed=32, scored=33, generations=4, groups=1, tokens=192)

    def kept(layers: int) -> int:
        config = AutoConfig.for_model("llama", **{**fields, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shared = SharedBase(model.requires_grad_(False), None, "tiny")
        batch = pack([Group([1] * 64, [[2] * 33 for _ in range(4)], [0, 1, 2, 3])], torch.device("cpu"))
        assert batch.input_ids.shape[1] == shape.tokens
        weights = {parameter.untyped_storage().data_ptr() for parameter in shared.parameters()}
        found = {}

        def remember(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage
            return tensor

        context = PackedContext(batch.buckets, torch.device("cpu"))
        with shared.role("policy"), torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            hidden = shared.hidden_states(batch.input_ids, batch.position_ids, context)
        assert hidden.requires_grad
        return sum(storage.nbytes() for storage in found.values())

    layer = Layer(dims("SmolLM2-135M"), shape, 2, (16,) * 7, 1, dense=0, explicit_scores=True, wide=False)
    assert kept(3) - kept(2) == pytest.approx(layer.saved(), rel=0.01)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_phases_are_integers_and_sum_up(algorithm):
    model, recipe = dims("Qwen2.5-0.5B"), load_recipe("grpo_gsm8k", [f"algorithm={algorithm}"])
    on_card = phases(model, recipe, SETTINGS, card(11))
    assert list(on_card) == ["rollout", "scoring", "update", "optimizer", "export"]
    for components in on_card.values():
        assert all(isinstance(size, int) and size >= 0 for size in components.values())
        live = total(components) - components["allocator"]
        assert components["allocator"] == round(live * (ALLOCATOR_FACTOR - 1))
    name, peak = peak_phase(on_card)
    assert peak == sum(on_card[name].values()) == max(sum(phase.values()) for phase in on_card.values())
    assert all(phase["allocator"] == 0 for phase in phases(model, recipe, SETTINGS, cpu(11)).values())


def test_a_card_needs_a_buffer_in_adamw_and_no_explicit_scores():
    on_cpu, on_card = (memory_of(device=device) for device in (cpu(16), card(11)))
    assert on_cpu.optimizer()["update_buffers"] == 0
    assert on_card.optimizer()["update_buffers"] == 4 * on_card.one_adapter
    assert memory_of(device=card(11), optim="adamw_8bit").optimizer()["update_buffers"] == 0


def test_evaluation_rows_have_prompts_of_their_own():
    recipe = load_recipe("grpo_gsm8k", ["data.eval_size=0"])
    assert shapes.prompts_at_once(recipe, 64) == 8
    assert shapes.prompts_at_once(load_recipe("grpo_gsm8k"), 64) == 64
    assert shapes.prompts_at_once(recipe, 12) == 1  # waves are of whole groups
    assert shapes.prompts_at_once(recipe, 1) == 1
