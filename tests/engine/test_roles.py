"""Roles with adapters and heads of their own: what trains, what is frozen, and that stock peft computes the same."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tiny_models import CPU, EOS, VOCAB, fill_adapter, tiny_base, tiny_model, tiny_tokenizer
from torch.nn.functional import cosine_similarity

from lowmem_rlhf.architecture.adapters import HEAD, WEIGHTS, saved_adapter
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import CRITIC, INITIAL, POLICY, REFERENCE, REWARD
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import RewardConfig, TrainingConfig
from lowmem_rlhf.rewards.loading import load_rewards
from lowmem_rlhf.training.optimizer import Optimizer

IDS = torch.randint(EOS + 1, VOCAB, (14,), generator=torch.Generator().manual_seed(3)).tolist()


def states(base, role):
    """Return the last hidden states of IDS in a role, a row each token but the last."""
    with base.role(role):
        return base.states(base.layout.lay_out([Group(IDS[:1], [IDS[1:]], [0])], CPU))


def logits(base, role):
    return base.head.logits(states(base, role))


def stock_logits(model):
    return model(input_ids=torch.tensor([IDS[:-1]])).logits[0]


def filled(parameters, seed=1, size=0.1):
    """Make weights differ from zero, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * size)


def stock_adapter(folder, model=None, seed=1, base="tiny/llama", config=LoraConfig, **settings):
    """Write an adapter that peft made, without any of this package; return the folder."""
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    if config is LoraConfig:
        settings = {"r": 4, "lora_alpha": 8, **settings}
    made = get_peft_model(tiny_model("llama") if model is None else model, config(**settings))
    filled([p for p in made.parameters() if p.requires_grad], seed)
    made.peft_config["default"].base_model_name_or_path = base
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


def own_adapter(folder, seed=1, head=False, role=POLICY):
    """Write an adapter, with a score head if asked for, from a base of its own; return the folder."""
    base, _ = tiny_base("llama")
    if head:
        base.add_head(POLICY, std=0.1, seed=seed)
    fill_adapter(base, seed)
    base.save_adapter(folder, role)
    return folder


def base_for(saved, dtype=torch.float32):
    """Return a base whose policy has a saved adapter's shape, as `session` makes it."""
    return SharedBase(
        tiny_model("llama").to(dtype),
        tiny_tokenizer(),
        "tiny/llama",
        **saved.shape.values,
    )


@pytest.fixture
def four_roles(tmp_path):
    """Return a base with the roles of PPO that goes on from SFT: two adapters train, two are frozen."""
    start = saved_adapter(str(stock_adapter(tmp_path / "start")), "tiny/llama")
    reward = saved_adapter(str(own_adapter(tmp_path / "reward", 2, head=True)), "tiny/llama")
    base = base_for(start)
    base.start_from(start)
    base.add_saved_role(REWARD, reward)
    base.add_role(CRITIC, 2, 4.0, "all-linear", seed=5, below=INITIAL)
    base.add_head(CRITIC, bias=True)
    return base


# What trains


def test_the_policy_and_the_critic_train_and_nothing_else(four_roles):
    base = four_roles
    layers = len(list(base.adapter_layers()))
    names = list(base.trainable())
    assert len(names) == 2 * 2 * layers + 2
    assert sum(".policy." in name for name in names) == sum(".critic." in name for name in names[:-2]) == 2 * layers
    assert names[-2:] == ["heads.critic.weight", "heads.critic.bias"]
    training = {name for name, p in [*base.peft.named_parameters()] if p.requires_grad}
    assert training == set(names[:-2])
    assert base.roles == {
        REFERENCE: (INITIAL,),
        POLICY: (POLICY,),
        INITIAL: (INITIAL,),
        REWARD: (REWARD,),
        CRITIC: (INITIAL, CRITIC),
    }


def test_an_optimizer_step_moves_what_trains_and_no_frozen_role(four_roles):
    base = four_roles
    base.add_head(POLICY, std=0.1)

    def snapshot():
        adapters = {role: base.adapter_state(role) for role in (POLICY, INITIAL, REWARD, CRITIC)}
        heads = {f"{role} head": dict(base.heads[role].state_dict()) for role in (REWARD, CRITIC)}
        return copy.deepcopy(adapters | heads), {role: states(base, role).detach() for role in (REFERENCE, REWARD)}

    before, frozen = snapshot()
    optimizer = Optimizer(
        base.trainable(), TrainingConfig(learning_rate=0.1, weight_decay=0.5), "adamw", 3, CPU, scale_loss=False
    )
    for _ in range(2):  # the first one cannot move an A whose B is zero
        optimizer.zero_grad()
        loss = sum(base.outputs(role, states(base, role)).square().mean() for role in (POLICY, CRITIC, REWARD))
        (loss + base.outputs(CRITIC, states(base, CRITIC)).sum()).backward()
        optimizer.step()
        base.adapters_changed()
    after, now = snapshot()
    for name, tensors in before.items():
        moves = name in (POLICY, CRITIC, "critic head")
        assert all(torch.equal(tensor, after[name][key]) != moves for key, tensor in tensors.items()), name
    for role, wanted in frozen.items():
        assert torch.equal(now[role], wanted)


def test_a_frozen_head_stays_where_it_is(four_roles):
    four_roles.freeze(CRITIC)
    assert all(".policy." in name for name in four_roles.trainable())


def test_a_new_role_begins_as_what_it_stands_on(four_roles):
    torch.testing.assert_close(states(four_roles, CRITIC), states(four_roles, INITIAL), rtol=0, atol=1e-5)
    assert not torch.allclose(states(four_roles, CRITIC), states(four_roles, REWARD), atol=0.1)
    assert not four_roles.outputs(CRITIC, states(four_roles, CRITIC)).any()


# The same numbers as stock peft


def test_a_chain_is_both_adapters_of_stock_peft_with_its_gradient(tmp_path):
    start = saved_adapter(str(stock_adapter(tmp_path / "start", r=3, lora_alpha=7)), "tiny/llama")
    base = base_for(start)
    base.start_from(start)
    base.add_role(CRITIC, 2, 5.0, "all-linear", below=INITIAL)
    filled([p for name, p in base.trainable().items() if ".critic." in name], seed=4)
    base.adapters_changed()
    base.save_adapter(tmp_path / "critic", CRITIC)

    stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "start", adapter_name="start")
    stock.load_adapter(tmp_path / "critic", "critic", is_trainable=True)
    stock.base_model.set_adapter(["start", "critic"])
    wanted, got = stock_logits(stock), logits(base, CRITIC)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (got - logits(base, INITIAL)).abs().max() > 0.1 and (
        got - stock_logits(tiny_model("llama"))
    ).abs().max() > 0.1

    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    (wanted * weight).sum().backward()
    (got * weight).sum().backward()
    theirs = {name: p.grad for name, p in stock.named_parameters() if ".critic." in name}
    mine = {name: p.grad for name, p in base.peft.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys() and len(mine) == 2 * len(list(base.adapter_layers()))
    for name, gradient in mine.items():
        assert (gradient - theirs[name]).norm() < 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama-tied-biased", "gpt2", "phi3", "lfm2"])
def test_what_is_saved_loads_in_stock_peft(family, use_rslora, tmp_path):
    stock = tiny_model(family)
    base = SharedBase(
        copy.deepcopy(stock), tiny_tokenizer(), f"tiny/{family}", r=4, lora_alpha=6, use_rslora=use_rslora
    )
    fill_adapter(base)
    base.save_adapter(tmp_path / "adapter")
    plain = stock_logits(stock)
    loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(logits(base, POLICY), stock_logits(loaded), rtol=0, atol=2e-5)
    assert (stock_logits(loaded) - plain).abs().max() > 0.05
    assert loaded.peft_config["default"].base_model_name_or_path == f"tiny/{family}"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_run_goes_on_from_an_adapter_of_stock_peft(use_rslora, tmp_path):
    stock_adapter(tmp_path / "adapter", r=9, lora_alpha=3, use_rslora=use_rslora)
    saved = saved_adapter(str(tmp_path / "adapter"), "someone/llama")
    assert (saved.shape.r, saved.shape.lora_alpha, saved.shape.use_rslora, saved.head) == (9, 3, use_rslora, None)
    base = base_for(saved)
    base.start_from(saved)
    stock = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    with torch.no_grad():
        wanted = stock_logits(stock)
        for role in (POLICY, REFERENCE):
            torch.testing.assert_close(logits(base, role), wanted, rtol=0, atol=1e-5)
        fill_adapter(base, seed=8)
        torch.testing.assert_close(logits(base, REFERENCE), wanted, rtol=0, atol=1e-5)
        assert (logits(base, POLICY) - wanted).abs().max() > 0.1
        base.save_adapter(tmp_path / "longer")
        again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "longer")
        torch.testing.assert_close(logits(base, POLICY), stock_logits(again), rtol=0, atol=1e-5)


def test_an_nf4_base_carries_the_roles_too(tiny_folder, tmp_path):
    def load():
        return SharedBase.load(str(tiny_folder), CPU, "nf4", "float32", r=4, lora_alpha=8)

    base, model = load(), str(tiny_folder)
    fill_adapter(base)
    base.add_head(POLICY, std=0.1)
    base.save_adapter(tmp_path / "saved")
    wanted = logits(base, POLICY).detach()
    stock, _ = load_base(str(tiny_folder), "nf4", "float32", CPU)
    stock = PeftModel.from_pretrained(stock, tmp_path / "saved").train()  # eval mode takes another, rounder kernel
    torch.testing.assert_close(stock_logits(stock), wanted, rtol=0, atol=1e-5)

    saved = saved_adapter(str(tmp_path / "saved"), model)
    other = load()
    other.start_from(saved)
    other.add_saved_role(REWARD, saved)
    other.add_role(CRITIC, 2, 4.0, "all-linear", below=INITIAL)
    for role in (POLICY, REFERENCE, REWARD, CRITIC):
        torch.testing.assert_close(logits(other, role), wanted, rtol=0, atol=1e-5)
    assert all(".policy." in name or ".critic." in name for name in other.trainable())


def test_a_mamba_goes_on_from_its_own_adapter(tmp_path):
    """Its adapter leaves layers out that peft lists all the same."""
    base, stock = tiny_base("mamba")
    base.save_adapter(tmp_path / "adapter")
    saved = saved_adapter(str(tmp_path / "adapter"), "tiny/mamba")
    longer = SharedBase(stock, tiny_tokenizer(), "tiny/mamba", **saved.shape.values)
    longer.start_from(saved)
    assert torch.equal(states(longer, POLICY), states(base, POLICY))


# Heads


def test_a_head_survives_a_round_trip(tmp_path):
    base, _ = tiny_base("llama")
    base.add_head(POLICY, std=0.2, seed=3)
    base.save_adapter(tmp_path / "adapter")
    wanted = base.outputs(POLICY, states(base, POLICY)).detach()
    assert wanted.shape == (len(IDS) - 1,) and wanted.std() > 0.01

    other, _ = tiny_base("llama", adapter=0.0)
    other.add_saved_role(REWARD, saved_adapter(str(tmp_path / "adapter"), "tiny/llama"))
    assert torch.equal(other.outputs(REWARD, states(other, REWARD)), wanted)
    other.add_head(POLICY, seed=9)
    other.load_role(tmp_path / "adapter")
    assert torch.equal(other.outputs(POLICY, states(other, POLICY)), wanted)


def test_a_critic_survives_a_round_trip_with_its_bias(four_roles, tmp_path):
    filled([p for name, p in four_roles.trainable().items() if "critic" in name])
    four_roles.adapters_changed()
    wanted = four_roles.outputs(CRITIC, states(four_roles, CRITIC)).detach()
    four_roles.save_adapter(tmp_path / "saved", CRITIC)
    filled([p for name, p in four_roles.trainable().items() if "critic" in name], seed=7)
    four_roles.adapters_changed()
    assert not torch.equal(four_roles.outputs(CRITIC, states(four_roles, CRITIC)), wanted)
    four_roles.load_role(tmp_path / "saved", CRITIC)
    assert torch.equal(four_roles.outputs(CRITIC, states(four_roles, CRITIC)), wanted)


def test_a_head_on_the_policys_adapter_is_saved_alone(tmp_path):
    base, _ = tiny_base("llama")
    base.roles[CRITIC] = base.roles[POLICY]
    base.add_head(CRITIC, bias=True, std=0.1)
    base.save_adapter(tmp_path / "critic", CRITIC)
    assert [file.name for file in (tmp_path / "critic").iterdir()] == [HEAD]


def test_a_heads_start_is_a_function_of_its_seed_in_fp32():
    base, _ = tiny_base("llama", dtype=torch.bfloat16)
    for role, seed in (("a", 1), ("b", 1), ("c", 2)):
        base.add_head(role, std=0.5, seed=seed)
    a, b, c = (base.heads[role].weight[0] for role in "abc")
    assert torch.equal(a, b) and abs(cosine_similarity(a, c, dim=0)) < 0.7
    assert a.dtype == torch.float32 and 0.3 < float(a.std()) < 0.7
    assert base.outputs("a", states(base, POLICY)).dtype == torch.float32


# What is refused


def refused(match, work, *args):
    with pytest.raises(UserError, match=match) as caught:
        work(*args)
    assert "\n" not in str(caught.value)


OTHERS = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "began as pissa, which changes the base's weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "began as olora, which changes the base's weights"),
    "DoRA": ({"use_dora": True}, "has use_dora, which scales each row"),
    "trained head": ({"modules_to_save": ["lm_head"]}, "has modules_to_save, whole weights"),
    "biased": ({"lora_bias": True}, "has lora_bias, more than a low-rank product"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "has alora_invocation_tokens, more than a low-rank product"),
    "LoHa": ({"config": LoHaConfig}, "is of kind LOHA; only LoRA adapters can be continued"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_adapters_of_other_kinds_are_refused(kind, tmp_path):
    settings, message = OTHERS[kind]
    stock_adapter(tmp_path / "adapter", **settings)
    refused(rf"^adapter '.*adapter' {message}", saved_adapter, str(tmp_path / "adapter"), "tiny/llama")


def test_an_adapter_from_loftq_is_refused(tmp_path):
    folder = stock_adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "loftq"}))
    refused("began as loftq, which changes", saved_adapter, str(folder), "tiny/llama")


def test_a_pattern_that_fits_no_layer_is_no_pattern(tmp_path):
    stock_adapter(tmp_path / "adapter", target_modules=["q_proj"], rank_pattern={"gate_up_proj": 2})
    assert saved_adapter(str(tmp_path / "adapter"), "tiny/llama").shape.target_modules == ("q_proj",)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_an_unreadable_adapter_is_refused(text, tmp_path):
    folder = stock_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused("adapter_config.json cannot be read", saved_adapter, str(folder), "tiny/llama")


@pytest.mark.parametrize("change", [{"r": "a"}, {"r": 0}, {"r": None}, {"r": True}, {"lora_alpha": "2x"}])
def test_an_adapter_without_its_numbers_is_refused(change, tmp_path):
    folder = stock_adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    refused("must have a whole number above 0 as r", saved_adapter, str(folder), "tiny/llama")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x10" + bytes(40)])
def test_an_adapter_whose_weights_are_torn_is_refused(content, tmp_path):
    folder = stock_adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(content)
    refused("safetensors cannot be read .*fetch it again", saved_adapter, str(folder), "tiny/llama")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    folder = stock_adapter(tmp_path / "named", base="meta/llama-9b")
    refused(
        r"belongs to 'meta/llama-9b' and the recipe's model is 'tiny/llama'; give model=meta/llama-9b, or .* put the "
        "name into",
        saved_adapter,
        str(folder),
        "tiny/llama",
    )
    for changes in ({"hidden_size": 32}, {"num_hidden_layers": 3}):
        folder = stock_adapter(tmp_path / f"shaped-{changes}", tiny_model("llama", **changes))
        saved = saved_adapter(str(folder), "tiny/llama")
        base, _ = tiny_base("llama")
        before = base.adapter_state()
        refused(
            r"does not fit this base: its files hold \d+ (of another shape|tensors) \(base_model",
            base.start_from,
            saved,
        )
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.adapter_state().items())


def test_a_reference_to_no_adapter_says_what_is_there(tmp_path):
    refused("'.*nowhere' does not exist; give a run's folder", saved_adapter, str(tmp_path / "nowhere"), "tiny/llama")
    refused(r"holds no adapter_config.json with", saved_adapter, str(tmp_path), "tiny/llama")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: x\n")
    refused("is a run without a finished adapter; let it finish first", saved_adapter, str(run), "tiny/llama")
    checkpoint = own_adapter(run / "checkpoints" / "step-2")
    refused(
        rf"a run without a finished adapter; .*--resume, goes on\), or take its checkpoint {checkpoint}$",
        saved_adapter,
        str(run),
        "tiny/llama",
    )
    assert saved_adapter(str(checkpoint), "tiny/llama").folder == checkpoint
    own_adapter(run / "adapter")
    assert saved_adapter(str(run), "tiny/llama").folder == run / "adapter"
    shutil.rmtree(run / "adapter")
    (run / "model").mkdir()
    refused("is a classifier's run, which has no adapter", saved_adapter, str(run), "tiny/llama")


def test_where_a_score_is_needed_an_adapter_without_a_head_is_refused(tmp_path):
    bare, scored = own_adapter(tmp_path / "bare"), own_adapter(tmp_path / "scored", head=True)
    base, _ = tiny_base("llama")
    base.add_head(POLICY)
    refused(rf"{bare} holds an adapter without a head .*; take a reward model's", base.load_head, bare, POLICY)
    base.load_head(scored, POLICY)
    wide, _ = tiny_base("llama", hidden_size=32)
    wide.add_head(POLICY)
    refused(f"the head in {scored} does not fit this base", wide.load_head, scored, POLICY)
    base.add_head(CRITIC, bias=True)
    refused(f"the head in {scored} does not fit this base", base.load_head, scored, CRITIC)

    def reward(folder):
        options = {"adapter": str(folder)}
        return load_rewards([RewardConfig(function="reward_adapter", name="liking", options=options)], model="t/llama")

    assert reward(scored)[0].function.saved.head == scored / HEAD
    refused(r"^rewards: liking: adapter '.*bare' has no score head .*algorithm: reward_model", reward, bare)
    refused("^rewards: liking: adapter '.*none' does not exist", reward, tmp_path / "none")
    (scored / WEIGHTS).unlink()
    refused("^rewards: liking: adapter '.*scored' holds adapter_config.json without its", reward, scored)
