"""What TRL gets for a model: one base in two roles, exact on padded batches of any layout, fp32 masters throughout."""

import gc
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import save_tiny, tiny_base
from training_cases import close, save_model
from trl import DPOConfig, DPOTrainer
from trl_cases import PAIRS, loop_of, step, trl_recipe, write_rows

from lowmem_rlhf.algorithms.trl.data import batch_rows
from lowmem_rlhf.algorithms.trl.model import IGNORED, RoleModel, read_rows
from lowmem_rlhf.algorithms.trl.trainers import make_trainer
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.roles import POLICY, REFERENCE

CPU = torch.device("cpu")
BYTES = [{key: value * 3 for key, value in row.items()} for row in PAIRS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("trl") / "llama")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Return a tiny model that is wide enough for NF4."""
    return save_tiny("llama", tmp_path_factory.mktemp("trl") / "wide")


def padded(side="right"):
    """Return input ids, mask and labels of four rows, two of which share their prompt."""
    prompts, answers = [[5, 6, 7], [5, 6, 7], [8], [9, 10]], [[11, 12], [13], [14, 15, 16, 17], [18]]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    rows = [(p + a, [1] * (len(p) + len(a)), [IGNORED] * len(p) + a) for p, a in zip(prompts, answers, strict=True)]

    def fill(values, filler):
        rest = [filler] * (longest - len(values))
        return values + rest if side == "right" else rest + values

    return tuple(torch.tensor([fill(row[i], filler) for row in rows]) for i, filler in enumerate((0, 0, IGNORED)))


# the last three are not packed, or pass a state on; what they compute themselves depends on padding before a row
@pytest.mark.parametrize(
    ("family", "side"),
    [
        *((name, side) for name in ("llama", "gemma2", "gpt2") for side in ("right", "left")),
        *(("bloom", "right"), ("mamba", "right"), ("lfm2", "right")),
    ],
)
def test_log_probs_and_logits_are_the_stock_models(family, side):
    base, stock = tiny_base(family)
    ids, mask, labels = padded(side)
    positions = {} if family in ("bloom", "mamba", "lfm2") else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    reference = RoleModel(base, REFERENCE, 16)
    with torch.no_grad():
        want = stock(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits.log_softmax(-1)
        out = reference(ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
        logits = reference(ids, attention_mask=mask, use_cache=False).logits
    chosen = want[:, :-1].gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    scored = labels[:, 1:] != IGNORED
    entropy = -(want.exp() * want).sum(-1)[:, :-1]
    assert torch.allclose(out.log_probs, chosen * scored, atol=2e-5)
    assert torch.allclose(out.entropy, entropy * scored, atol=2e-5)
    inner = (mask[:, :-1] * mask[:, 1:]).bool()  # positions that predict a token of their row
    assert torch.allclose(logits.log_softmax(-1)[:, :-1][inner], want[:, :-1][inner], atol=2e-5)
    with torch.no_grad():
        policy = RoleModel(base, POLICY, 16)(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert not torch.allclose(policy.log_probs, out.log_probs, atol=1e-2)  # the adapter is on in one role only


def test_a_prompt_of_several_rows_runs_once_and_only_real_tokens_are_fed():
    base, _ = tiny_base("llama")
    ids, mask, labels = padded()
    policy = RoleModel(base, POLICY, 16)
    with base.role(POLICY):
        policy(ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum().backward()
    # three prompts of 3, 1 and 2 tokens, and the answers less the last token of each, which predicts nothing
    assert policy.fed == (3 + 1 + 2) + (1 + 0 + 3 + 0)
    assert all(p.grad is not None for p in base.trainable().values())


@pytest.mark.parametrize(
    "labels", [[IGNORED, 6, IGNORED], [IGNORED] * 3, [5, 6, 7]], ids=["a gap behind", "nothing", "everything"]
)
def test_rows_whose_scored_tokens_are_not_their_last_are_refused(labels):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="last ones of a row"):
        read_rows(ids, torch.ones_like(ids), torch.tensor([labels]))


def test_the_mode_of_the_model_does_not_reach_the_base():
    base, _ = tiny_base("llama")
    policy = RoleModel(base, POLICY, 16)
    modes = [m.training for m in base.model.modules()]
    policy.eval()
    assert not policy.training and [m.training for m in base.model.modules()] == modes
    assert dict(policy.named_parameters()).keys() == base.trainable().keys()
    assert not list(RoleModel(base, REFERENCE, 16).parameters())


def storages(module):
    """Return the storages of a module's tensors; of quantized weights what they hold besides too."""
    found = [*module.parameters(), *module.buffers()]
    found += [state.absmax for p in module.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}


def float_tensors() -> list[torch.Tensor]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [x for x in gc.get_objects() if torch.is_tensor(x) and x.is_floating_point()]


@pytest.mark.parametrize("start", [False, True])
def test_policy_and_reference_are_one_base(wide, tmp_path, start):
    file = write_rows(tmp_path, BYTES)
    recipe = trl_recipe(
        wide, "trl/dpo", file, trl={"max_length": 64}, hardware={"quantization": "nf4", "compute_dtype": "bfloat16"}
    )
    if start:
        loop_of(recipe, tmp_path).base.save_adapter(tmp_path / "start")
        recipe = recipe.model_copy(update={"adapter": str(tmp_path / "start")})
    weights, _ = load_base(str(wide), "nf4", "bfloat16", CPU)
    once = sum(storages(weights).values())
    del weights
    before = float_tensors()  # of earlier tests in this process
    loop = loop_of(recipe, tmp_path)
    base = loop.base
    step(loop)
    adapters = {id(p): p for n, p in base.peft.named_parameters() if ".policy." in n or ".initial." in n}
    # fp32 masters, and of a frozen adapter the 16-bit numbers that it multiplies with
    count = sum(p.numel() for p in base.trainable().values())
    assert sum(p.numel() * p.element_size() for p in adapters.values()) == count * (4 + (2 if start else 0))
    assert sum(storages(base).values()) == once + count * (4 + (2 if start else 0))
    assert loop.trainer.model.base is loop.trainer.ref_model.base is base
    there = {id(x) for x in before}
    floats = [x for x in float_tensors() if id(x) not in there]
    shapes = {(layer.out_features, layer.in_features) for layer in base.adapter_layers()}
    own = {p.data_ptr() for p in base.peft.parameters()}
    assert not [x.shape for x in floats if tuple(x.shape) in shapes and x.data_ptr() not in own]


def test_adapters_stay_fp32_where_stock_trl_rounds_them_to_bf16(wide, tmp_path):
    hardware = {"quantization": "nf4", "compute_dtype": "bfloat16"}
    file = write_rows(tmp_path, BYTES)
    loop = loop_of(
        trl_recipe(wide, "trl/dpo", file, trl={"max_length": 64}, hardware=hardware, training={"learning_rate": 1e-6}),
        tmp_path,
    )
    before = {name: p.detach().clone() for name, p in loop.base.trainable().items()}
    for _ in range(2):  # of the first, A has no gradient: B is zero
        step(loop)
    assert {p.dtype for p in loop.base.trainable().values()} == {torch.float32}
    assert {x.dtype for x in loop.base.adapter_state().values()} == {torch.float32}
    moved = [float((p.detach() != before[name]).float().mean()) for name, p in loop.base.trainable().items()]
    assert min(moved) > 0.9

    stock, tokenizer = load_base(str(wide), "nf4", "bfloat16", CPU)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    args = DPOConfig(output_dir=str(tmp_path / "stock"), bf16=True, use_cpu=True, report_to="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = DPOTrainer(
            model=get_peft_model(stock, lora),
            args=args,
            train_dataset=Dataset.from_list(BYTES),
            processing_class=tokenizer,
        )
    assert {p.dtype for p in theirs.model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_float16_scales_the_loss_and_has_the_gradients_of_float32(model, tmp_path):
    file = write_rows(tmp_path, PAIRS)
    found = {}
    for dtype in ("float32", "float16"):
        loop = loop_of(trl_recipe(model, "trl/dpo", file, hardware={"compute_dtype": dtype}), tmp_path)
        found[dtype] = step(loop)
        assert (loop.optimizer.loss_scale > 1) == (dtype == "float16")
        assert {p.dtype for p in loop.base.trainable().values()} == {torch.float32}
        assert loop.optimizer.skipped == 0
    assert found["float16"][0]["loss"] == pytest.approx(found["float32"][0]["loss"], abs=1e-3)
    assert found["float16"][0]["grad_norm"] == pytest.approx(found["float32"][0]["grad_norm"], rel=2e-2)
    want = found["float32"][1]
    assert all(close(g, want[n]) < 3e-2 for n, g in found["float16"][1].items() if float(want[n].norm()) > 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(model, tmp_path, checkpointing):
    file, found = write_rows(tmp_path, PAIRS), []
    for tokens in (4096, 64):
        hardware = {"micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
        loop = loop_of(trl_recipe(model, "trl/dpo", file, hardware=hardware), tmp_path)
        if tokens == 64:  # less than what the plan allows, as after memory ran out
            loop.ladder.micro_batch_tokens = 20
        calls, compute = [], loop.trainer.compute_loss

        def counted(*args, calls=calls, compute=compute, **kwargs):
            calls.append(1)
            return compute(*args, **kwargs)

        loop.trainer.compute_loss = counted
        found.append((*step(loop), len(calls)))
    (whole, want, once), (cut, got, often) = found
    assert once == 1 and often >= 3
    assert {k: v for k, v in cut.items() if k != "tokens/trained"} == pytest.approx(
        {k: v for k, v in whole.items() if k != "tokens/trained"}, rel=1e-4, abs=1e-5
    )
    assert all(close(got[n], g) < 1e-5 for n, g in want.items() if float(g.norm()) > 1e-6)


def test_a_step_that_runs_out_of_memory_goes_on_with_less(model, tmp_path, monkeypatch):
    recipe = trl_recipe(model, "trl/dpo", write_rows(tmp_path, PAIRS), training={"prompts_per_step": 12})
    whole, want = step(loop_of(recipe, tmp_path))
    loop = loop_of(recipe, tmp_path)
    policy, compute, seen = loop.trainer.model, loop.trainer.compute_loss, []

    def short(model, inputs, **kwargs):
        loss = compute(model, inputs, **kwargs)  # what TRL then has measured is not counted twice
        seen.append(len(inputs["input_ids"]))
        if len(inputs["input_ids"]) > 12:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(loop.trainer, "compute_loss", short)
    got, gradients = step(loop)
    assert seen[0] == 24 and sum(rows for rows in seen if rows <= 12) == 24
    assert loop.ladder.micro_batch_tokens < 4096 and policy.fed == got["tokens/trained"]
    shared = {key: value for key, value in whole.items() if key != "tokens/trained"}
    assert {key: got[key] for key in shared} == pytest.approx(shared, rel=1e-4, abs=1e-5)
    assert all(close(gradients[n], g) < 1e-5 for n, g in want.items() if float(g.norm()) > 1e-6)


def test_trl_writes_nothing_into_the_base(model, tmp_path):
    stock, tokenizer = load_base(str(model), "none", "float32", CPU)
    tokenizer.pad_token = None
    loop = loop_of(trl_recipe(model, "trl/dpo", write_rows(tmp_path, PAIRS)), tmp_path)
    loop.base.tokenizer.pad_token = None
    before = loop.base.model.config.to_dict()
    made = make_trainer(loop.recipe, loop.base, batch_rows(loop.stream.examples, loop.kind), 16)
    assert made.processing_class.pad_token == "</s>" and loop.base.tokenizer.pad_token is None
    assert loop.base.model.config.to_dict() == before
    assert before["pad_token_id"] == stock.config.pad_token_id != made.model.config.pad_token_id
