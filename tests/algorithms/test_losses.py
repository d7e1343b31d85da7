"""The table of GRPO's losses: normalisers by hand, any split, and losses from a user's file."""

from dataclasses import replace

import pytest
import torch

from lowmem_rlhf.algorithms.grpo.losses import LOSSES, LossInputs, clipped, load_loss
from lowmem_rlhf.algorithms.grpo.settings import GRPOSettings
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.recipe.loading import validate_recipe

LENGTHS = [2, 5, 3]
WEIGHTS = {
    "grpo": [1 / 6, 1 / 15, 1 / 9],
    "bnpo": [1 / 10] * 3,
    "dapo": [1 / 10] * 3,
    "dr_grpo": [1 / 24] * 3,
    "luspo": [1 / 3] * 3,
}
MASKED = {
    "grpo": [1 / 6, 1 / 9],  # the masked completion still counts as a completion
    "bnpo": [1 / 5] * 2,  # its tokens do not
    "dapo": [1 / 5] * 2,
    "dr_grpo": [1 / 24] * 2,
    "luspo": [1 / 3] * 2,
}


def inputs_of(lengths=(2, 5, 3), tokens: int = 10, beta: float = 0.0, **settings) -> LossInputs:
    """Return inputs of completions of these lengths out of three, with a limit of 8 tokens."""
    count = sum(lengths)
    logps, old, ref = torch.randn((3, count), generator=torch.Generator().manual_seed(0)).mul(0.3).sub(1)
    each = torch.tensor([float(n) for n in lengths for _ in range(n)])
    rows = torch.tensor([row for row, n in enumerate(lengths) for _ in range(n)])
    own = {"row_index": rows, "rows": len(lengths), "settings": GRPOSettings.model_construct(**settings)}
    return LossInputs(logps.requires_grad_(), old, ref, each - 3.5, each, None, 3, tokens, 8, 0.2, 0.3, beta, **own)


def cut(inputs: LossInputs, part: slice) -> LossInputs:
    """Return the inputs of a micro-batch of some of the tokens."""
    names = ("logps", "old_logps", "ref_logps", "advantages", "lengths")
    rows = inputs.row_index[part] - inputs.row_index[part][0]
    return replace(inputs, **{n: getattr(inputs, n)[part] for n in names}, row_index=rows, rows=int(rows[-1]) + 1)


def weights_of(loss_type: str, inputs: LossInputs, lengths) -> list[float]:
    """Return by completion what the clipped surrogate of its tokens is multiplied with."""
    ratios = (LOSSES[loss_type](inputs) / clipped(inputs)).detach().split(list(lengths))
    assert all(torch.allclose(one, one[0].expand_as(one)) for one in ratios)
    return [one[0].item() for one in ratios]


@pytest.mark.parametrize("loss_type", WEIGHTS)
def test_a_token_counts_by_the_whole_batch(loss_type):
    assert weights_of(loss_type, inputs_of(), LENGTHS) == pytest.approx(WEIGHTS[loss_type])
    rest = (2, 3)  # the second is masked
    assert weights_of(loss_type, inputs_of(rest, tokens=5), rest) == pytest.approx(MASKED[loss_type])


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_any_split_between_completions_adds_up_to_the_same_bits(loss_type, level, beta):
    inputs = inputs_of(beta=beta, importance_sampling_level=level)
    whole = LOSSES[loss_type](inputs)
    for at in (2, 7):
        parts = [cut(inputs, part) for part in (slice(0, at), slice(at, 10))]
        assert torch.equal(torch.cat([LOSSES[loss_type](part) for part in parts]), whole)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_default_losses_may_be_cut_within_a_completion_and_those_of_completions_may_not(loss_type):
    inputs = inputs_of(importance_sampling_level="sequence" if loss_type == "luspo" else "token")
    parts = [LOSSES[loss_type](cut(inputs, part)) for part in (slice(0, 4), slice(4, 10))]
    whole = loss_type in ("luspo", "vespo")
    assert torch.equal(torch.cat(parts), LOSSES[loss_type](inputs)) is not whole


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_is_left_out_keeps_its_kl_term_alone(loss_type, beta):
    inputs = replace(inputs_of(beta=beta), kept=torch.tensor([1.0] * 5 + [0.0] * 5))
    loss, everything = LOSSES[loss_type](inputs), LOSSES[loss_type](replace(inputs, kept=None))
    kl_alone = LOSSES[loss_type](replace(inputs, kept=None, advantages=torch.zeros(10)))
    assert torch.equal(loss[:5], everything[:5]) and not torch.equal(loss[5:], everything[5:])
    torch.testing.assert_close(loss[5:], kl_alone[5:], rtol=1e-6, atol=0)
    assert bool(loss[5:].any()) == bool(beta)


# Losses of one's own


def load(tmp_path, text: str, name: str = "mine", **settings):
    (tmp_path / "losses.py").write_text("import torch\n" + text, encoding="utf-8")
    return load_loss(f"{tmp_path}/losses.py:{name}", GRPOSettings(**settings))


def test_a_loss_from_a_file_is_called_as_it_is(tmp_path):
    loss = load(tmp_path, "def mine(inputs):\n    return -inputs.logps * inputs.advantages / inputs.tokens\n")
    inputs = inputs_of()
    assert torch.equal(loss.function(inputs), -inputs.logps * inputs.advantages / 10)
    assert loss.needs_advantage


def test_a_loss_that_needs_no_advantage_trains_on_all_completions(tmp_path):
    loss = load(tmp_path, "def mine(inputs):\n    return -inputs.logps / inputs.completions / inputs.lengths\n")
    assert not loss.needs_advantage
    assert all(load_loss(name).needs_advantage for name in LOSSES)


PARTS = [{"top_entropy_quantile": 0.2}, {"off_policy_mask_threshold": 0.1}]


@pytest.mark.parametrize("settings", PARTS)
def test_a_loss_of_ones_own_has_to_leave_out_what_the_settings_do(tmp_path, settings):
    plain = "def mine(inputs):\n    return -inputs.logps * inputs.advantages / inputs.tokens"
    masked = "\n    ".join([plain.partition("\n")[0], "loss = -inputs.logps * inputs.advantages / inputs.tokens"])
    masked += "\n    return loss * inputs.kept\n"
    assert load(tmp_path, masked, **settings).needs_advantage
    with pytest.raises(UserError, match=f"learns from tokens that grpo.{next(iter(settings))} leaves out; multiply"):
        load(tmp_path, plain, **settings)


def test_a_loss_of_ones_own_may_be_of_whole_completions(tmp_path):
    text = (
        "def mine(inputs):\n    ratio = inputs.ratio()\n    surrogate = -ratio * inputs.advantages\n"
        "    return inputs.objective(surrogate, ratio) / inputs.completions\n"
    )
    loss = load(tmp_path, text, importance_sampling_level="sequence")
    inputs = inputs_of(beta=0.04, importance_sampling_level="sequence")
    assert torch.equal(loss.function(inputs), inputs.objective(-inputs.ratio() * inputs.advantages, inputs.ratio()) / 3)
    assert loss.needs_advantage


REFUSED = {
    "def mine(inputs, other):\n    return inputs.logps": "fails on a trial: TypeError: mine() missing 1 required",
    "def mine(inputs):\n    return inputs.logprobs": "mine, line 3 fails on a trial: AttributeError: 'LossInputs'",
    "def mine(inputs):\n    return inputs.logps.sum()": "gave a tensor of shape () for inputs.logps of shape (9,)",
    "def mine(inputs):\n    return 1.0": "gave a float for inputs.logps",
    "def mine(inputs):\n    return inputs.advantages": "gave a loss without a gradient; compute it from inputs.logps",
    "def mine(inputs):\n    return inputs.logps * inputs.advantages / len(inputs.logps)": "is cut into micro-batches",
    "mine = 3": "losses.py:mine is an int, not a loss; name something that is called with (inputs)",
    "def other(inputs):\n    return 1": "losses.py defines no 'mine'",
    "def mine(": "losses.py, line 2, cannot be imported: SyntaxError",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_loss_is_refused_in_one_sentence(tmp_path, text):
    with pytest.raises(UserError) as error:
        load(tmp_path, text + "\n")
    message = str(error.value)
    assert message.startswith("grpo.loss_type: ") and REFUSED[text] in message and "\n" not in message


FAILS_LATER = {
    "raise SystemExit": r"failed in .*losses\.py, line \d: SystemExit: no message",
    "raise KeyboardInterrupt": r"failed in .*losses\.py, line \d: KeyboardInterrupt",
    "loss = loss.sum()": r"gave a tensor of shape \(\) for inputs\.logps of shape \(10,\)",
    "loss = loss.detach()": "gave a loss without a gradient",
    "loss = loss / 0.0": r"gave -inf for a token \(log-prob -1\.338, advantage -1\.5\)",
    "loss = loss.log()": "gave nan for a token",
    "loss = 1.0": "gave a float",
}


@pytest.mark.parametrize("line", FAILS_LATER)
def test_a_loss_that_goes_wrong_in_the_run_is_named(tmp_path, line):
    body = ["loss = -inputs.logps * inputs.advantages", "if len(inputs.logps) > 9:", f"    {line}", "return loss"]
    loss = load(tmp_path, "\n    ".join(["def mine(inputs):", *body]))
    with pytest.raises(RunError, match=r"^grpo\.loss_type: .*losses\.py:mine " + FAILS_LATER[line]):
        loss.function(inputs_of())


def test_a_loss_changes_nothing_but_its_own_numbers(tmp_path):
    text = (
        "def mine(inputs):\n    torch.manual_seed(0)\n    inputs.advantages.zero_()\n    inputs.old_logps.zero_()\n"
        "    loss = -inputs.logps * inputs.lengths\n    torch.set_grad_enabled(False)\n"
        "    torch.set_default_dtype(torch.float64)\n    return loss\n"
    )
    loss, inputs = load(tmp_path, text), inputs_of()
    old, state = inputs.old_logps.clone(), torch.get_rng_state()
    loss.function(inputs).sum().backward()
    assert torch.equal(inputs.old_logps, old) and inputs.advantages.any() and torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(inputs.logps.grad, -inputs.lengths)


def test_memory_that_runs_out_in_a_loss_is_said_as_such(tmp_path):
    loss = load(
        tmp_path,
        "def mine(inputs):\n    if len(inputs.logps) > 9:\n        raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return -inputs.logps\n",
    )
    with pytest.raises(torch.OutOfMemoryError):
        loss.function(inputs_of())


def recipe_with(loss_type: str):
    values = {"model": "none", "data": {"train": "arithmetic"}, "rewards": ["length"]}
    return validate_recipe({**values, "grpo": {"loss_type": loss_type}})


def test_a_recipe_takes_a_known_loss_or_a_function_of_a_file():
    assert recipe_with("DAPO").grpo.loss_type == "dapo"
    assert recipe_with("mine.py:loss").grpo.loss_type == "mine.py:loss"
    with pytest.raises(UserError, match=r"grpo\.loss_type: got 'dapoo'.*dapo"):
        recipe_with("dapoo")
    with pytest.raises(UserError, match=r"grpo\.loss_type: there is no file absent\.py"):
        load_loss("absent.py:loss")
    with pytest.raises(UserError, match=r"grpo\.loss_type: got 'a:b'; a function of your own is written path"):
        load_loss("a:b")


NONSENSE = [
    ({"loss_type": "luspo"}, r"importance_sampling_level: got token; luspo is a loss of whole completions"),
    ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, r"vespo weighs whole completions by itself"),
    (
        {"loss_type": "vespo", "importance_sampling_correction": True},
        r"got sequence_mask; vespo multiplies the weights",
    ),
    ({"loss_type": "cispo"}, r"epsilon_high: got 0\.2; for cispo it is the largest weight itself"),
    ({"loss_type": "sapo", "delta": 4}, r"delta: sapo has no clip range that it could bound"),
    ({"epsilon_high": 0.4, "delta": 1.4}, r"delta: got 1\.4; it should be above 1\.4"),
]


@pytest.mark.parametrize(("grpo", "said"), NONSENSE)
def test_settings_that_make_no_sense_together_are_refused_in_one_sentence(grpo, said):
    values = {"model": "none", "data": {"train": "arithmetic"}, "rewards": ["length"], "grpo": grpo}
    with pytest.raises(UserError, match=f"grpo.*{said}"):
        validate_recipe(values)
