"""A step with TRL's trainers on the shared base is the step of stock TRL with stock peft: loss, gradients, adapter."""

import importlib
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from training_cases import close, make_tokenizer, save_model
from transformers import AutoModelForCausalLM
from trl_cases import LABELLED, PAIRS, loop_of, step, trl_recipe, write_rows

from lowmem_rlhf.algorithms.trl.spec import TRL_TRAINERS
from lowmem_rlhf.data.stream import PromptStream

RATE = 1e-2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("trl") / "llama")


def stock_trainer(algorithm, model, rows, folder, state, steps=2, starts=False, **arguments):
    """Return TRL's trainer as it comes, on a stock peft model in fp32 with the adapter ``state``."""
    kind = TRL_TRAINERS[algorithm]
    module = importlib.import_module(kind.module)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    given = {"peft_config": lora}
    if starts:  # TRL then makes its reference of the adapter that the model comes with
        stock, given = get_peft_model(stock, lora), {}
        set_peft_model_state_dict(stock, state)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None  # ORPO's and CPO's would put one before every prompt
    args = getattr(module, kind.config)(
        output_dir=str(folder / "stock"),
        per_device_train_batch_size=len(rows),
        learning_rate=RATE,
        max_steps=steps,
        logging_steps=1,
        optim="adamw_torch",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **{"beta": 0.3, "max_length": 32, **arguments},
    )
    made = getattr(module, kind.trainer)(
        model=stock, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **given
    )
    set_peft_model_state_dict(made.model, state)
    return made


def masters(model, adapter):
    """Return an adapter's parameters by their names without the adapter's."""
    return {n.replace(f".{adapter}.", "."): p for n, p in model.named_parameters() if f".{adapter}." in n}


def stock_gradients(trainer):
    """Return the loss of a batch of all rows and the gradients of it, without a step."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in masters(trainer.model, "default").items()}
    trainer.model.zero_grad()
    for store in ("_metrics", "_stored_metrics"):
        getattr(trainer, store, {"train": {}})["train"].clear()
    return float(loss.detach()), found


def compare(algorithm, model, folder, rows, data=(), adapter=None, **trl):
    """Take the steps of our loop and of stock TRL on the same rows; KTO's second would pair them up anew."""
    steps = 1 if algorithm == "trl/kto" else 2
    recipe = trl_recipe(
        model,
        algorithm,
        write_rows(folder, rows),
        data=dict(data),
        trl=trl,
        adapter=adapter and str(adapter),
        training={"prompts_per_step": len(rows), "learning_rate": RATE, "max_steps": steps},
    )
    loop = loop_of(recipe, folder)
    # the reference of KTO's KL are the answers' neighbours: stock TRL gets the rows in the order of our step
    order = PromptStream(range(len(rows)), len(rows), recipe.training.seed).batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {name: x.clone() for name, x in loop.base.adapter_state().items()}
        stock = stock_trainer(algorithm, model, [rows[i] for i in order], folder, state, steps, bool(adapter), **trl)
        loss, want = stock_gradients(stock)
        metrics, got = step(loop)
        assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
        got = {name.replace(".policy.", "."): g for name, g in got.items()}
        assert got.keys() == want.keys()
        assert all(close(got[name], g) < 2e-5 or float(g.norm()) < 1e-9 for name, g in want.items())
        assert sum(float(g.norm()) > 1e-4 for g in want.values()) >= len(want) // 2  # of a fresh adapter, every B
        taken = [metrics, *(step(loop)[0] for _ in range(steps - 1))]
        stock.train()
    log = [entry for entry in stock.state.log_history if "loss" in entry]
    for ours, theirs in zip(taken, log, strict=True):
        shared = [k for k in theirs if k in ours and k not in ("step", "learning_rate")]
        assert {"loss", "rewards/chosen", "rewards/rejected", "grad_norm"} <= set(shared)
        for key in shared:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    trained, mine = masters(stock.model, "default"), masters(loop.base.peft, "policy")
    assert trained.keys() == state.keys()
    for name, p in trained.items():
        assert close(mine[name].detach(), p.detach()) < 1e-4
        assert float((p.detach() - state[name]).abs().max()) > RATE / 10 or (steps == 1 and "lora_A" in name)


@pytest.mark.parametrize("algorithm", ["trl/dpo", "trl/orpo", "trl/cpo"])
def test_a_step_on_pairs_is_stock_trls(algorithm, model, tmp_path):
    compare(algorithm, model, tmp_path, PAIRS)


def test_a_step_on_labelled_answers_is_stock_trls(model, tmp_path):
    compare("trl/kto", model, tmp_path, LABELLED, data={"label": "label"}, desirable_weight=1.5)


@pytest.mark.parametrize(
    ("algorithm", "trl"),
    [
        ("trl/dpo", {"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.7, 0.3], "label_smoothing": 0.1}),
        ("trl/dpo", {"loss_type": "ipo", "ld_alpha": 0.5}),
        ("trl/cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.3}),
    ],
)
def test_losses_of_the_section_are_stock_trls(algorithm, trl, model, tmp_path):
    compare(algorithm, model, tmp_path, PAIRS, **trl)


@pytest.mark.parametrize("algorithm", ["trl/dpo", "trl/kto"])
def test_the_reference_is_the_adapter_that_the_run_goes_on_from(algorithm, model, tmp_path):
    file = write_rows(tmp_path, PAIRS, "first.jsonl")
    loop = loop_of(trl_recipe(model, "trl/orpo", file, training={"prompts_per_step": 4}), tmp_path)
    step(loop)
    loop.base.save_adapter(tmp_path / "start")
    rows, data = (LABELLED, {"label": "label"}) if algorithm == "trl/kto" else (PAIRS, {})
    compare(algorithm, model, tmp_path, rows, data=data, adapter=tmp_path / "start")
