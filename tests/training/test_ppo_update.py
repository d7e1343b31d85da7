"""PPO's update is plain autograd's on the whole mini-batch, however it is cut, and stops where it should."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ppo_cases import add_critic, base_with, equal, ppo_batch, ppo_gradients, ppo_settings, targets_of
from tiny_models import tiny_base
from training_cases import LIMIT, Heard, close, ladder_of, limits_of, logps_of, recipe_of, shifted, stepper_of, weights

from lowmem_rlhf.algorithms.ppo import policy_gradient
from lowmem_rlhf.algorithms.ppo import update as ppo_update
from lowmem_rlhf.algorithms.ppo.update import Targets, mini_batches, update
from lowmem_rlhf.engine.roles import CRITIC, INITIAL, POLICY
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.report import html
from lowmem_rlhf.rollout.rollout import Rollout
from lowmem_rlhf.session.train import train

CLOSE = 1e-5
# critic, targets of `targets_of`
KINDS = {
    "own critic": ("adapter", {}),
    "critic above the start": ("above the start", {}),
    "critic on the policy": ("policy", {}),
    "own critic, one more": ("adapter", {"bootstrap_position": True}),
    "critic on the policy, one more": ("policy", {"bootstrap_position": True}),
    "no critic": (None, {}),
    "whole completions": (None, {"by_sequence": True}),
}
PLAIN = [("critic on the policy", 0.0), ("whole completions", 0.0)]  # without an entropy bonus


def check_splits(base, batch, targets, settings, splits):
    """Compare splits with the whole mini-batch: loss, every gradient, every metric."""
    whole, want = ppo_gradients(base, batch, targets, settings, limits_of(1_000_000))
    assert all(gradient.norm() > 0 for gradient in want.values()), "every parameter has a gradient"
    fed = set()
    for tokens, tile in splits:
        part, got = ppo_gradients(base, batch, targets, settings, limits_of(tokens, tile))
        fed.add(part.tokens)
        assert part.loss == pytest.approx(whole.loss, rel=CLOSE, abs=1e-6)
        assert part.entropy == pytest.approx(whole.entropy, rel=CLOSE)
        assert part.scored == whole.scored == sum(len(c.ids) for c in batch.completions)
        assert part.stats.metrics() == pytest.approx(whole.stats.metrics(), rel=1e-4, abs=1e-6)
        assert got.keys() == want.keys()
        for name, gradient in got.items():
            assert close(gradient, want[name]) < CLOSE, (name, tokens)
    return whole, fed


@pytest.mark.parametrize(("kind", "entropy_coef"), [*((kind, 0.01) for kind in KINDS), *PLAIN])
def test_any_split_gives_the_whole_mini_batchs_gradient(kind, entropy_coef):
    critic, how = KINDS[kind]
    base, batch, settings = base_with(critic), ppo_batch(), ppo_settings(entropy_coef=entropy_coef)
    targets = targets_of(base, batch, **how)
    splits = [(1, 1), (17, 7), (60, 64)]
    whole, fed = check_splits(base, batch, targets, settings, splits)
    assert len(fed) == len(splits)  # prompts repeat where a group is cut
    metrics = whole.stats.metrics()
    assert 0 < metrics["policy/clip_fraction"] < 1
    assert ("value/loss" in metrics) == bool(critic)
    if critic:
        assert 0 < metrics["value/clip_fraction"] < 1
    assert whole.stats.tokens == (len(batch.completions) if "by_sequence" in how else whole.scored)
    if "bootstrap_position" in how:
        full = sum(len(c.ids) == LIMIT for c in batch.completions)
        assert whole.stats.value_tokens == whole.scored + len(batch.completions) - full


@pytest.mark.parametrize("kind", ["critic above the start", "critic on the policy", "own critic, one more"])
def test_recomputed_layers_have_the_same_gradients(kind):
    critic, how = KINDS[kind]
    base, batch, settings = base_with(critic), ppo_batch(), ppo_settings(entropy_coef=0.01)
    targets = targets_of(base, batch, **how)
    _, want = ppo_gradients(base, batch, targets, settings, limits_of())
    base.set_gradient_checkpointing(True)
    part, got = ppo_gradients(base, batch, targets, settings, limits_of(40, 5))
    assert all(close(got[name], want[name]) < CLOSE for name in want)
    assert part.tokens > 0


@pytest.mark.parametrize(("family", "kind"), [("bloom", "own critic, one more"), ("mamba", "critic on the policy")])
def test_splits_of_padded_rows_agree_too(family, kind):
    critic, how = KINDS[kind]
    base, batch = base_with(critic, family), ppo_batch((5, 2, 9))
    assert not base.packable
    check_splits(base, batch, targets_of(base, batch, **how), ppo_settings(entropy_coef=0.01), [(1, 3), (40, 5)])


def test_a_mini_batch_is_normalised_by_itself_and_gradients_scale_with_the_loss():
    base, batch, settings = base_with("adapter"), ppo_batch(), ppo_settings()
    targets, rows = targets_of(base, batch), [0, 3, 7, 8, 14]
    part, want = ppo_gradients(base, batch, targets, settings, limits_of(), rows)
    alone = Rollout([batch.prompts[row // 4] for row in rows], [batch.completions[row] for row in rows], 1)
    fields = (targets.old_logps, targets.advantages, targets.old_values, targets.returns)
    other, got = ppo_gradients(
        base, alone, Targets(*({i: f[row] for i, row in enumerate(rows)} for f in fields)), settings, limits_of()
    )
    assert part.loss == pytest.approx(other.loss, rel=CLOSE)
    assert part.scored == sum(len(batch.completions[row].ids) for row in rows)
    _, scaled = ppo_gradients(base, batch, targets, settings, limits_of(), rows, loss_scale=4096.0)
    for name in want:
        assert close(got[name], want[name]) < CLOSE, name
        assert close(scaled[name], want[name] * 4096) < CLOSE, name


# Plain autograd: stock transformers with stock peft, padded rows, all logits


def stock_roles(base, stock):
    """Return the stock model with the base's adapters under stock peft."""
    for role, config in base.peft.peft_config.items():
        plain = LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules, lora_dropout=0.0
        )
        if role == POLICY:
            stock = get_peft_model(stock, plain, adapter_name=role)
        else:
            stock.add_adapter(role, plain)
    theirs = {name: m for name, m in stock.named_modules() if hasattr(m, "lora_A")}
    ours = {name: m for name, m in base.peft.named_modules() if hasattr(m, "lora_A")}
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, layer in theirs.items():
            layer.load_state_dict(ours[name].state_dict(), strict=False)
            layer.scaling.update(ours[name].scaling)  # a frozen adapter's is part of its numbers
    return stock


def padded_rows(batch):
    """Return token ids (N, P + L), their mask, and the positions (N, L) before each completion's tokens."""
    width = max(len(c.ids) for c in batch.completions)
    texts = [[*batch.prompts[row // 4], *c.ids] for row, c in enumerate(batch.completions)]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    there = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    starts = torch.tensor([len(batch.prompts[row // 4]) for row in range(len(texts))])
    before = (starts[:, None] - 1 + torch.arange(width + 1)).clamp(max=longest - 1)
    return ids, there, before


def matrix(rows, width):
    return torch.stack([torch.nn.functional.pad(rows[row], (0, width - len(rows[row]))) for row in sorted(rows)])


def plain_gradients(base, stock, batch, targets, settings, temperature):
    """Return loss, its three parts' metrics and all gradients of the formulas written out over (N, L)."""
    stock = stock_roles(base, stock)
    head = base.heads[CRITIC] if targets.returns else None
    ids, there, before = padded_rows(batch)
    lengths = torch.tensor([len(c.ids) for c in batch.completions])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]

    def states(role):
        stock.base_model.set_adapter(list(base.roles[role]))
        out = stock.base_model.model.model(input_ids=ids, attention_mask=there, use_cache=False).last_hidden_state
        return out.gather(1, before[..., None].expand(-1, -1, out.shape[-1]))  # (N, L + 1, H)

    for p in stock.parameters():
        p.grad = None
    hidden = states(POLICY)
    logits = stock.base_model.model.lm_head(hidden[:, :width]) / temperature
    distribution = logits.log_softmax(-1)
    tokens = torch.tensor([[*c.ids] + [0] * (width - len(c.ids)) for c in batch.completions])
    logps = distribution.gather(-1, tokens[..., None]).squeeze(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    old = matrix(targets.old_logps, width)
    if targets.by_sequence:
        ratio = ((logps - old) * mask).sum(1).exp()
        advantages = torch.cat([targets.advantages[row] for row in range(len(lengths))])
        counted = torch.ones_like(ratio, dtype=torch.bool)
    else:
        ratio, advantages, counted = (logps - old).exp(), matrix(targets.advantages, width), mask
    clipped = ratio.clamp(1 - settings.cliprange, 1 + settings.cliprange)
    loss = torch.max(-advantages * ratio, -advantages * clipped)[counted].mean()
    loss = loss - settings.entropy_coef * entropy[mask].mean()
    loss.backward(retain_graph=True)
    total = loss.item()
    if head is not None:
        valued = torch.tensor([len(targets.returns[row]) for row in range(len(lengths))])
        columns = int(valued.max())
        value_mask = torch.arange(columns) < valued[:, None]
        weight, bias = head.weight.detach().clone().requires_grad_(), head.bias.detach().clone().requires_grad_()
        values = (states(CRITIC)[:, :columns] @ weight.T + bias).squeeze(-1)
        old_values, returns = matrix(targets.old_values, columns), matrix(targets.returns, columns)
        kept = old_values + (values - old_values).clamp(-settings.cliprange_value, settings.cliprange_value)
        squares = torch.max((values - returns) ** 2, (kept - returns) ** 2)
        value = settings.vf_coef * 0.5 * squares[value_mask].mean()
        value.backward()
        total += value.item()
    gradients = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None and INITIAL not in name}
    if head is not None:
        gradients |= {f"heads.{CRITIC}.weight": weight.grad, f"heads.{CRITIC}.bias": bias.grad}
    return total, gradients


@pytest.mark.parametrize(("kind", "entropy_coef"), [*((kind, 0.01) for kind in KINDS), *PLAIN])
def test_the_gradient_is_plain_autograds(kind, entropy_coef):
    critic, how = KINDS[kind]
    base, stock = tiny_base("llama")
    add_critic(base, critic)
    batch, settings = ppo_batch(), ppo_settings(entropy_coef=entropy_coef, vf_coef=0.3)
    targets = targets_of(base, batch, temperature=0.7, **how)
    part, got = ppo_gradients(base, batch, targets, settings, limits_of(60, 7, temperature=0.7))
    loss, want = plain_gradients(base, stock, batch, targets, settings, temperature=0.7)
    assert part.loss == pytest.approx(loss, rel=CLOSE, abs=1e-6)
    assert got.keys() == want.keys()
    for name, gradient in got.items():
        assert close(gradient, want[name]) < CLOSE, name


# Epochs and mini-batches


def test_every_row_is_dealt_out_once_and_differently_in_every_epoch():
    rows = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31]
    for count in (1, 2, 3, 4, 11, 50):
        dealt = mini_batches(rows, count, "seed/0")
        assert len(dealt) == min(count, len(rows))
        assert sorted(row for mini in dealt for row in mini) == rows
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert dealt == mini_batches(rows, count, "seed/0")
    epochs = [mini_batches(rows, 3, f"seed/{epoch}") for epoch in range(20)]
    assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 20
    assert rows == sorted(rows)  # the caller's list stays


def run_update(drift=0.0, **changes):
    """Return what the update of a small batch did; its policy is the one that sampled, to a drift of the log-probs."""
    base, batch, settings = base_with("adapter"), ppo_batch((5, 2, 9)), ppo_settings(**changes)
    rows = [row for row in range(12) if row != 6]
    targets = targets_of(base, batch)
    old = shifted(logps_of(base, batch, POLICY), by=drift)
    fields = (old, targets.advantages, targets.old_values, targets.returns)
    targets = Targets(*({row: field[row] for row in rows} for field in fields))
    optimizer = stepper_of(base.trainable(), total=100, learning_rate=0.05)
    ladder, heard = ladder_of(70), Heard()
    result = update(base, optimizer, batch, targets, settings, ladder, "seed", heard)
    tokens = ladder.micro_batch_tokens
    return SimpleNamespace(base=base, optimizer=optimizer, result=result, tokens=tokens, **vars(heard))


def test_all_epochs_are_taken_and_counted():
    done = run_update(num_ppo_epochs=3, num_mini_batches=2)
    assert (done.optimizer.taken, done.result.epochs, done.tokens, done.said) == (6, 3, 70, [])
    assert done.shown == [(n, 6) for n in range(1, 7)]
    scored = sum(len(c.ids) for row, c in enumerate(ppo_batch((5, 2, 9)).completions) if row != 6)
    assert done.result.scored == scored  # of the first epoch
    assert done.result.stats.tokens == done.result.stats.value_tokens == 3 * scored
    assert done.result.first.metrics()["policy/approx_kl"] < 1e-10
    assert done.result.stats.metrics()["policy/approx_kl"] > 1e-4
    assert all(p.grad is None for p in done.base.trainable().values())


def test_every_epoch_deals_the_rows_out_anew(monkeypatch):
    dealt = []
    original = ppo_update.backward
    monkeypatch.setattr(ppo_update, "backward", lambda *args: dealt.append(args[2]) or original(*args))
    run_update(num_ppo_epochs=3, num_mini_batches=2)
    assert len(dealt) == 6
    epochs = [dealt[i : i + 2] for i in (0, 2, 4)]
    assert all(sorted(a + b) == [row for row in range(12) if row != 6] for a, b in epochs)
    assert len({str(epoch) for epoch in epochs}) == 3


def test_mini_batches_are_optimizer_steps_of_their_own():
    one, two = (run_update(num_ppo_epochs=1, num_mini_batches=n) for n in (1, 2))
    assert (one.optimizer.taken, two.optimizer.taken) == (1, 2)
    assert not equal(weights(one.base), weights(two.base))
    # the loss is the mean over the mini-batches; the first of them sees the policy that sampled
    assert two.result.first.tokens < one.result.first.tokens == one.result.stats.tokens == two.result.stats.tokens


def test_a_policy_that_went_too_far_ends_the_step_before_it_goes_on():
    free = run_update(num_ppo_epochs=4)
    kept = run_update(num_ppo_epochs=4, target_kl=1e-4)
    assert free.optimizer.taken == 4 and not free.said
    assert kept.said == ["epoch 2: approx_kl is above 1.5 times ppo.target_kl; the step ends here"]
    assert (kept.optimizer.taken, kept.result.epochs) == (1, 2)  # the pass that found it out is no step
    assert kept.result.stats.tokens == 2 * kept.result.scored
    once = run_update(num_ppo_epochs=1)
    assert equal(weights(kept.base), weights(once.base))
    assert kept.result.grad_norm == once.result.grad_norm
    far = kept.result.stats.metrics()["policy/approx_kl"]
    assert run_update(num_ppo_epochs=2, target_kl=far).optimizer.taken == 1  # the mean of 0 and twice that
    assert run_update(num_ppo_epochs=2, target_kl=4 * far).optimizer.taken == 2
    assert all(p.grad is None for p in kept.base.trainable().values())


def test_the_first_mini_batch_is_always_a_step():
    """In 16 bits it may look far from the policy that sampled, which it is not."""
    done = run_update(num_ppo_epochs=3, target_kl=1e-9, drift=0.01)
    assert done.result.first.metrics()["policy/approx_kl"] > 1.5e-9
    assert (done.optimizer.taken, done.result.epochs) == (1, 2)


# The sampled policy is the trained policy


@pytest.mark.parametrize(
    ("quantization", "dtype", "close_to_0"),
    [("none", "float32", 1e-6), ("none", "bfloat16", 1e-3), ("nf4", "bfloat16", 1e-3)],
)
def test_the_first_epoch_is_on_the_policy_that_sampled(
    tiny_folder, tmp_path, monkeypatch, quantization, dtype, close_to_0
):
    results = []

    def recorded(*args):
        results.append(update(*args))
        return results[-1]

    monkeypatch.setattr(policy_gradient, "update", recorded)
    monkeypatch.setattr(html, "write_report", lambda run: None)
    hardware = {"quantization": quantization, "compute_dtype": dtype, "micro_batch_tokens": 60}
    small = recipe_of(
        tiny_folder,
        hardware=hardware,
        data={"eval_size": 0},
        generation={"num_generations": 2, "temperature": 0.7},
        training={"max_steps": 2, "learning_rate": 0.01},
    )
    values = {**small.model_dump(), "algorithm": "ppo", "ppo": {"num_ppo_epochs": 2}}
    run = train(validate_recipe(values), tmp_path / "run")
    rows = run.metrics()
    assert len(rows) == len(results) == 2
    for row, result in zip(rows, results, strict=True):
        first = result.first.metrics()
        assert row["policy/approx_kl_first"] == first["policy/approx_kl"] < close_to_0
        rounding = 1e-5 if dtype == "float32" else 0.1
        assert max(first["policy/ratio_max"] - 1, 1 - first["policy/ratio_min"]) < rounding
        assert first["policy/clip_fraction"] == 0
        assert row["sampling/logp_difference"] < rounding
        assert row["policy/approx_kl"] > max(1e-6, 10 * first["policy/approx_kl"])  # the later epoch has moved away
    assert abs(rows[0]["kl"]) < 1e-6 < abs(rows[1]["kl"])
