"""SFT and reward models: equal to stock transformers on padded rows, whatever a batch is cut into; epochs; resume."""

import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import CPU, EOS, VOCAB, tiny_base
from training_cases import Talk, close, ladder_of, make_tokenizer, recipe_of

from lowmem_rlhf.algorithms.build import make_trainer
from lowmem_rlhf.algorithms.common.epochs import with_epochs
from lowmem_rlhf.algorithms.reward_model import update as pairwise
from lowmem_rlhf.algorithms.reward_model.update import RewardModel
from lowmem_rlhf.algorithms.sft import update as supervised
from lowmem_rlhf.algorithms.sft.update import SFT
from lowmem_rlhf.architecture.adapters import HEAD
from lowmem_rlhf.data.examples import read_data
from lowmem_rlhf.data.supervised import Pair, Supervised, build_supervised
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.passes import BatchLimits
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.planning.run_plan import running_plan
from lowmem_rlhf.recipe.loading import validate_recipe
from lowmem_rlhf.rewards.adapter import load_adapter_reward
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.training.intervals import wilson

FAMILIES = ("llama", "bloom", "lfm2")  # packed; padded: biases on the scores; packed, with a convolution
SPLITS = (10_000, 40, 16)  # tokens of a micro-batch: all at once, some, one row


def tokens(*lengths, seed=0):
    """Return a list of random tokens for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(EOS + 1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def examples(seed=0):
    prompts, completions = tokens(5, 2, 9, 1, 7, seed=seed), tokens(3, 8, 1, 12, 6, seed=seed + 1)
    return [Supervised(*both) for both in zip(prompts, completions, strict=True)]


def pairs(seed=0, margins=(0.0, 0.5, 1.5, 0.0)):
    parts = tokens(5, 2, 9, 1, seed=seed), tokens(3, 8, 1, 12, seed=seed + 1), tokens(4, 2, 6, 12, seed=seed + 2)
    return [Pair(*fields) for fields in zip(*parts, margins, strict=True)]


def stage(model, algorithm, **sections):
    """Return a recipe of an algorithm that learns from given texts."""
    values = recipe_of(model).model_dump() | {"algorithm": algorithm, "rewards": [], "evaluation": {}}
    values["training"] |= {"prompts_per_step": 5 if algorithm == "sft" else 4}
    values[algorithm] |= {"max_length": 32}
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_recipe(values)


@pytest.fixture
def make(model_folder, tmp_path):
    """Return a function that makes a trainer of tiny tensors, in a run directory of its own."""

    def trainer(kind, base, train, held_out=(), tokens=10_000, **sections):
        algorithm = "sft" if kind is SFT else "reward_model"
        # what is sampled with has nothing to do with what is learned from
        recipe = stage(model_folder, algorithm, generation={"temperature": 0.4}, **sections)
        plan = running_plan(recipe)
        run = RunDirectory.create(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", recipe, plan.to_dict(), False)
        made = kind(recipe, plan, base, train, held_out, run)
        made.ladder.micro_batch_tokens = tokens
        return made

    return trainer


def one_step(trainer):
    """Take a step; return its metrics, and the gradients before it was taken."""
    found, step = {}, trainer.optimizer.step

    def spy(*loss, **before):
        found.update({name: p.grad.clone() for name, p in trainer.optimizer.parameters.items()})
        return step(*loss, **before)

    trainer.optimizer.step = spy
    return trainer.one_step(Talk(1)).metrics, found


def stock_of(base, stock, folder):
    """Return a stock model with the base's adapter, loaded by peft."""
    base.save_adapter(folder)
    return PeftModel.from_pretrained(stock, folder, is_trainable=True)


def padded(rows):
    """Return rows of token ids padded at their end, and their mask."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def same_gradients(mine, stock, tolerance=1e-4):
    """Check the adapter's gradients against a stock peft model's."""
    theirs = {name.replace(".default.", ".policy."): p.grad for name, p in stock.named_parameters() if p.requires_grad}
    mine = {name: gradient for name, gradient in mine.items() if not name.startswith("heads.")}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert close(gradient, theirs[name]) < tolerance, name


# SFT


def cross_entropy(stock, batch):
    """Return transformers' own loss of the padded batch, prompts and padding labelled -100."""
    ids, mask = padded([one.prompt_ids + one.completion_ids for one in batch])
    labels = ids.masked_fill(mask == 0, -100)
    for row, one in enumerate(batch):
        labels[row, : len(one.prompt_ids)] = -100
    return stock(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_is_the_cross_entropy_of_transformers_whatever_is_cut(family, make, tmp_path):
    base, plain = tiny_base(family)
    assert base.packable == (family != "bloom")
    stock = stock_of(base, plain, tmp_path / "adapter")
    wanted = cross_entropy(stock, examples())
    wanted.backward()
    for split in SPLITS:
        fresh = SharedBase(base_model(family), base.tokenizer, "tiny", r=4, lora_alpha=8)
        fresh.load_adapter(tmp_path / "adapter")
        trainer = make(SFT, fresh, examples(), tokens=split)
        metrics, gradients = one_step(trainer)
        assert metrics["loss"] == pytest.approx(float(wanted), abs=1e-5)
        assert metrics["tokens/learned"] == 30
        same_gradients(gradients, stock)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert 0 < metrics["entropy"] < math.log(VOCAB) and metrics["tokens/trained"] >= 5 * 6


def base_model(family):
    """Return the model that `tiny_base` makes, once more."""
    return tiny_base(family)[1]


def test_the_held_out_loss_is_over_all_learned_tokens(make, tmp_path):
    base, plain = tiny_base("llama")
    held_out = examples(seed=40)
    trainer = make(SFT, base, examples(), held_out, tokens=16)
    found = trainer.evaluate("before", Talk(1))
    wanted = float(cross_entropy(stock_of(base, plain, tmp_path / "adapter"), held_out))
    assert found == {
        "loss": pytest.approx(wanted, abs=1e-5),
        "perplexity": pytest.approx(math.exp(wanted), rel=1e-4),
        "accuracy": None,
        "headline": "loss",
        "problems": 5,
        "intervals": found["intervals"],
    }
    low, high = found["intervals"]["loss"]
    assert low < wanted < high and found["intervals"]["perplexity"] == [math.exp(low), math.exp(high)]
    assert make(SFT, base, examples()).evaluate("before", Talk(1)) == {}


def test_prompts_are_learned_or_not(model_folder, make, tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"question": "1+2=", "answer": "3"}, {"question": "12+30=", "answer": "42"}]
    losses, sections = {}, {"data": {"template": None}, "training": {"prompts_per_step": 2}}
    for only in (True, False):
        recipe = stage(model_folder, "sft", sft={"completion_only_loss": only}, **sections)
        batch = build_supervised(rows, recipe.data, recipe.sft, tokenizer, frozenset([tokenizer.eos_token_id]))
        base, plain = tiny_base("llama")
        trainer = make(SFT, base, batch, **sections)
        metrics, _ = one_step(trainer)
        ids, mask = padded([one.prompt_ids + one.completion_ids for one in batch])
        texts = ["1+2=\n3</s>", "12+30=\n42</s>"]
        assert tokenizer.batch_decode(ids, skip_special_tokens=False)[1].replace("<unk>", "\n") == texts[1]
        labels = ids.masked_fill(mask == 0, -100)
        if only:
            labels[0, :4] = labels[1, :6] = -100  # the questions; the newline behind them is learned
        base, _ = tiny_base("llama")
        stock = stock_of(base, plain, tmp_path / f"adapter-{only}")
        losses[only] = float(stock(input_ids=ids, attention_mask=mask, labels=labels).loss)
        assert metrics["loss"] == pytest.approx(losses[only], abs=1e-5)
        assert metrics["tokens/learned"] == (3 + 4 if only else 3 + 4 + 3 + 5)
    assert abs(losses[True] - losses[False]) > 1e-3


# Reward models


def scores_of(stock, head, texts):
    """Return the head's score at each text's last token, from padded rows of a stock model."""
    ids, mask = padded(texts)
    hidden = stock.get_base_model().get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    return F.linear(hidden[torch.arange(len(ids)), mask.sum(1) - 1], head).squeeze(-1)


def both_answers(batch):
    return [p.prompt_ids + p.chosen_ids for p in batch], [p.prompt_ids + p.rejected_ids for p in batch]


def bradley_terry(chosen, rejected, margins, center):
    """Return the loss written out: -log of the sigmoid as a fraction."""
    probability = 1 / (1 + torch.exp(-(chosen - rejected - torch.tensor(margins))))
    loss = -torch.log(probability).mean()
    return loss if center is None else loss + center * ((chosen + rejected) ** 2).mean()


@pytest.mark.parametrize(("family", "center"), [*((family, 0.3) for family in FAMILIES), ("llama", None)])
def test_a_reward_model_is_bradley_terry_whatever_is_cut(family, center, make, tmp_path):
    base, plain = tiny_base(family)
    stock = stock_of(base, plain, tmp_path / "adapter")
    batch = pairs()
    for split in SPLITS:
        fresh = SharedBase(base_model(family), base.tokenizer, "tiny", r=4, lora_alpha=8)
        fresh.load_adapter(tmp_path / "adapter")
        settings = {"center_rewards_coefficient": center}
        trainer = make(RewardModel, fresh, batch, tokens=split, reward_model=settings)
        head = fresh.heads[POLICY].weight.detach().clone().requires_grad_()
        assert 0.5 < float(head.norm()) < 2  # as TRL's fresh score head
        metrics, gradients = one_step(trainer)
        stock.zero_grad()
        chosen, rejected = (scores_of(stock, head, texts) for texts in both_answers(batch))
        loss = bradley_terry(chosen, rejected, [p.margin for p in batch], center)
        loss.backward()
        assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert metrics["accuracy"] == float((chosen > rejected).float().mean())
        assert metrics["score/margin"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
        assert metrics["score/mean"] == pytest.approx(float(torch.cat([chosen, rejected]).mean()), abs=1e-5)
        assert close(gradients["heads.policy.weight"], head.grad) < 1e-4
        same_gradients(gradients, stock)
    assert set(gradients) == set(fresh.trainable())


@pytest.mark.parametrize("center", [None, 0.3])
@pytest.mark.parametrize("margins", [(0.0,) * 4, (0.0, 0.5, 1.5, 0.0)])
def test_the_loss_of_pairs_is_trls(center, margins, make):
    """TRL's RewardTrainer computes its loss of our scores."""
    from trl import RewardTrainer

    base, _ = tiny_base("llama")
    batch = pairs(margins=margins)
    trainer = make(RewardModel, base, batch, reward_model={"center_rewards_coefficient": center})
    groups = pairwise.pair_groups(batch)
    rows = pairwise.head_outputs(base, POLICY, groups, BatchLimits(1.0, 64, 64))
    ends = torch.stack([rows[row][-1] for row in (0, 2, 4, 6, 1, 3, 5, 7)])  # TRL's batch: all chosen, all rejected

    def same(tensor):
        return tensor

    trl = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {"margin": torch.tensor(margins)} if any(margins) else {}
    wanted = RewardTrainer.compute_loss(trl, lambda **_: SimpleNamespace(logits=ends[:, None]), inputs)
    metrics, _ = one_step(trainer)
    assert metrics["loss"] == pytest.approx(float(wanted), abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(trl._metrics["eval"]["accuracy"][0])
    assert metrics["score/margin"] == pytest.approx(trl._metrics["eval"]["margin"][0], abs=1e-6)


def test_the_padded_layout_gives_what_the_packed_one_gives(make):
    """Of the two answers of a pair one row may hold the prompt once or twice."""
    found = []
    for padded in (False, True):
        base, _ = tiny_base("llama")
        if padded:
            base.pad("the test says so")
        found.append(one_step(make(RewardModel, base, pairs(), tokens=40)))
    (packed, theirs), (rows, mine) = found
    assert packed["loss"] == pytest.approx(rows["loss"], abs=1e-5)
    assert rows["tokens/trained"] > packed["tokens/trained"]
    assert all(close(mine[name], theirs[name]) < 1e-4 for name in theirs)


def test_held_out_pairs_are_measured_as_they_are_scored(make, tmp_path):
    base, plain = tiny_base("llama")
    held_out = pairs(seed=7) + pairs(seed=17)
    trainer = make(RewardModel, base, pairs(), held_out, tokens=16, reward_model={"center_rewards_coefficient": 0.2})
    stock, head = stock_of(base, plain, tmp_path / "adapter"), base.heads[POLICY].weight
    chosen, rejected = (scores_of(stock, head, texts) for texts in both_answers(held_out))
    found = trainer.evaluate("before", Talk(1))
    assert 0 < found["accuracy"] < 1
    assert found == {
        "loss": pytest.approx(float(bradley_terry(chosen, rejected, [p.margin for p in held_out], 0.2)), abs=1e-5),
        "accuracy": float((chosen > rejected).float().mean()),
        "score/margin": pytest.approx(float((chosen - rejected).mean()), abs=1e-5),
        "score/mean": pytest.approx(float(torch.cat([chosen, rejected]).mean()), abs=1e-5),
        "problems": 8,
        "headline": "accuracy",
        "intervals": found["intervals"],
    }
    assert found["intervals"]["accuracy"] == pytest.approx(wilson(found["accuracy"], 8))
    assert found["intervals"]["loss"][0] < found["loss"] < found["intervals"]["loss"][1]


def test_a_tie_is_half_right(make, monkeypatch):
    base, _ = tiny_base("llama")
    trainer = make(RewardModel, base, pairs(), pairs(margins=(0.0,) * 4))
    torch.nn.init.zeros_(base.heads[POLICY].weight)
    found = trainer.evaluate("before", Talk(1))
    assert (found["accuracy"], found["score/margin"], found["loss"]) == (0.5, 0, pytest.approx(math.log(2)))
    ends = [2.0, 1.0, 0.5, 0.5, 1.0, 3.0, 0.0, -1.0]  # right, a tie, wrong, right
    given = {row: torch.tensor([9.0, end]) for row, end in enumerate(ends)}
    monkeypatch.setattr(pairwise, "head_outputs", lambda *args: given)
    found = trainer.evaluate("before", Talk(1))
    assert (found["accuracy"], found["score/margin"], found["score/mean"]) == (2.5 / 4, 0.0, 7 / 8)


def test_the_reward_scores_what_the_reward_model_scored(make, tmp_path):
    base, _ = tiny_base("llama")
    trainer = make(RewardModel, base, pairs(), pairs(seed=7))
    one_step(trainer)
    wanted = trainer.evaluate("after", Talk(1))
    base.save_adapter(tmp_path / "adapter")
    reward = load_adapter_reward("liking", str(tmp_path / "adapter"), "tiny/llama")
    other, _ = tiny_base("llama", adapter=0.3)
    reward.bind(other, "reward")
    reward.ladder = ladder_of(16)
    held_out = pairs(seed=7)
    prompts = [pair.prompt_ids for pair in held_out for _ in range(2)]
    answers = [ids for pair in held_out for ids in (pair.chosen_ids, pair.rejected_ids)]
    values = reward(prompts, answers)
    assert sum(values) / len(values) == pytest.approx(wanted["score/mean"], abs=1e-5)
    assert sum(a - b for a, b in zip(values[::2], values[1::2], strict=True)) / 4 == pytest.approx(
        wanted["score/margin"], abs=1e-5
    )
    order = [3, 0, 6, 1, 7, 2, 5, 4]  # completions of a prompt need not stand together
    mixed = reward([prompts[i] for i in order], [answers[i] for i in order])
    assert mixed == pytest.approx([values[i] for i in order], abs=1e-5)


@pytest.mark.parametrize("part", ["adapter", "head", "scores"])
def test_a_reward_s_adapter_that_is_no_numbers_is_refused(make, tmp_path, part):
    base, _ = tiny_base("llama")
    make(RewardModel, base, pairs(), pairs(seed=7))
    head = base.heads[POLICY].weight
    with torch.no_grad():
        if part == "adapter":
            next(p for name, p in base.model.named_parameters() if f".{POLICY}." in name)[0, 0] = torch.nan
        else:
            head.fill_(torch.inf if part == "head" else 3e38)
    base.save_adapter(tmp_path / "adapter")
    reward = load_adapter_reward("liking", str(tmp_path / "adapter"), "tiny/llama")
    other, _ = tiny_base("llama", adapter=0.3)
    if part != "scores":
        with pytest.raises(
            UserError, match=rf"^rewards: liking: the {part} in .*adapter has values that are not finite"
        ):
            reward.bind(other, "reward")
        return
    reward.bind(other, "reward")
    reward.ladder = ladder_of(16)
    with pytest.raises(RunError, match=r"its adapter in .*adapter gives -?(inf|nan) for completion \d of 2"):
        reward([[3, 4], [3, 4]], [[5, 6], [7]])


@pytest.mark.parametrize("kind", [SFT, RewardModel])
def test_a_scaled_loss_is_the_same_step(kind, make):
    """float16 scales its loss; what is said of the step and what is taken is without the scale."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        base, _ = tiny_base("llama", dtype=dtype)
        trainer = make(kind, base, examples() if kind is SFT else pairs())
        assert trainer.optimizer.loss_scale == (1 if dtype == torch.float32 else 4096)
        found[dtype], _ = one_step(trainer)
        assert trainer.optimizer.skipped == 0
    for key in ("loss", "grad_norm"):
        assert found[torch.float16][key] == pytest.approx(found[torch.float32][key], rel=0.02)


# The loop


def test_epochs_become_steps(model_folder):
    for epochs, count, size, steps in ((1, 10, 4, 3), (2, 10, 4, 5), (3, 8, 4, 6), (1, 3, 4, 1)):
        recipe = stage(model_folder, "sft", training={"num_train_epochs": epochs, "prompts_per_step": size})
        assert with_epochs(recipe, count).training.max_steps == steps
        assert with_epochs(recipe, count).training.num_train_epochs == epochs
    recipe = stage(model_folder, "sft", training={"max_steps": 7})
    assert with_epochs(recipe, 10) == recipe


ROWS = [{"question": f"{a}+{b}", "answer": str(a + b), "wrong": "a?b"} for a in range(5) for b in range(2)]
DATA = {"template": "{question} {question}=", "train_size": None}
PAIRS = {**DATA, "chosen": "answer", "rejected": "wrong"}
KINDS = {
    "sft": {"data": DATA, "sft": {"eval_steps": 2}},
    "reward_model": {"data": PAIRS, "reward_model": {"eval_steps": 2}},
}


def built(model, algorithm, path, resume=False, sections=None, **training):
    """Return a trainer as `session.train` makes it, of ten rows and four held-out ones."""
    sections = {**(sections or KINDS[algorithm]), "training": {"prompts_per_step": 4, "save_steps": 100, **training}}
    recipe = stage(model, algorithm, **sections)
    plan = running_plan(recipe)
    base = SharedBase.load(recipe.model, CPU, "none", "float32", r=4, lora_alpha=8, seed=recipe.training.seed)
    held_out = [{**row, "question": f"9+{row['question']}"} for row in ROWS[:4]]

    def run_directory(resolved):
        return RunDirectory.create(path, resolved, plan.to_dict(), resume)

    trainer = make_trainer(recipe, plan, base, [], read_data(recipe, ROWS, held_out, base.tokens), run_directory)
    if resume:
        trainer.resume()
    return trainer


def run_to_the_end(trainer):
    view = Talk(trainer.recipe.training.max_steps, trainer.step)
    with view:
        return trainer.train(view)


@pytest.mark.parametrize("algorithm", KINDS)
def test_every_example_is_seen_once_an_epoch(algorithm, model_folder, tmp_path):
    trainer = built(model_folder, algorithm, tmp_path / "run", num_train_epochs=2)
    assert trainer.recipe.training.max_steps == 5
    seen, batch = [], trainer.stream.batch
    trainer.stream.batch = lambda step: seen.extend(batch(step)) or batch(step)
    run_to_the_end(trainer)
    order = [trainer.stream.examples.index(one) for one in seen]
    assert Counter(order[:10]) == Counter(order[10:]) == Counter(range(10))
    assert order[:10] != order[10:] and order[:10] != list(range(10))
    rates = [row["learning_rate"] for row in trainer.run.metrics()]
    assert rates == pytest.approx([1e-2 * left / 5 for left in (5, 4, 3, 2, 1)])  # the schedule ends with the epochs


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(algorithm, model_folder, tmp_path):
    def learned(trainer):
        adapter = trainer.run.path / "adapter"
        rows = [{k: v for k, v in r.items() if not k.startswith(("time/", "memory/"))} for r in trainer.run.metrics()]
        files = {file.name: load_file(file) for file in adapter.glob("*.safetensors")}
        return rows, {f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()}

    whole = built(model_folder, algorithm, tmp_path / "whole")
    wanted = run_to_the_end(whole)
    stopped = built(model_folder, algorithm, tmp_path / "run")
    step = stopped.one_step

    def interrupted(view):
        if stopped.step == 2:
            raise KeyboardInterrupt
        return step(view)

    stopped.one_step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_to_the_end(stopped)
    resumed = built(model_folder, algorithm, tmp_path / "run", resume=True)
    assert resumed.step == 2 and stopped.run.latest_checkpoint()[0] == 2
    assert run_to_the_end(resumed) == wanted
    (rows, tensors), (theirs, others) = learned(resumed), learned(whole)
    assert rows == theirs and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert any(name.startswith(HEAD) for name in tensors) == (algorithm == "reward_model")
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4]
    assert rows[-1]["eval/loss"] == wanted["after"]["loss"] < wanted["before"]["loss"]


@pytest.mark.parametrize("algorithm", KINDS)
def test_a_step_goes_on_with_less_memory_and_the_same_result(algorithm, model_folder, tmp_path, monkeypatch):
    whole = built(model_folder, algorithm, tmp_path / "whole", prompts_per_step=10)
    wanted, gradients = one_step(whole)
    module, name = (supervised, "packed_logprobs") if algorithm == "sft" else (pairwise, "packed_outputs")
    original, limit = getattr(module, name), 70

    def limited(base, *args):
        batch = next(one for one in args if hasattr(one, "input_ids"))
        if batch.input_ids.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(base, *args)

    monkeypatch.setattr(module, name, limited)
    trainer = built(model_folder, algorithm, tmp_path / "less", prompts_per_step=10)
    metrics, mine = one_step(trainer)
    assert trainer.ladder.micro_batch_tokens == 64 < whole.ladder.micro_batch_tokens
    assert metrics["loss"] == pytest.approx(wanted["loss"], abs=1e-6)
    assert all(close(mine[key], gradients[key]) < 1e-4 for key in gradients)


def test_a_reward_model_goes_on_with_its_head(model_folder, tmp_path):
    first = built(model_folder, "reward_model", tmp_path / "first")
    run_to_the_end(first)
    plan = running_plan(first.recipe)
    recipe = first.recipe.model_copy(update={"adapter": str(first.run.path)})
    base = SharedBase.load(recipe.model, CPU, "none", "float32", r=4, lora_alpha=8)
    base.load_adapter(first.run.path / "adapter")
    run = RunDirectory.create(tmp_path / "second", recipe, plan.to_dict(), False)
    second = RewardModel(recipe, plan, base, first.stream.examples, first.held_out, run)
    assert second.evaluate("before", Talk(1)) == first.evaluate("after", Talk(1))
