"""`grpo.sync_ref_model` in whole runs: when the reference moves and to where, and that no interruption changes it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import learned
from torch import nn
from training_cases import base_of, recipe_of, settings_of, stepper_of, train, trainer_of
from trl.trainer.callbacks import SyncRefModelCallback

from lowmem_rlhf.algorithms.grpo import following
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.following import mix_into_reference
from lowmem_rlhf.engine.roles import INITIAL, POLICY, REFERENCE
from lowmem_rlhf.inference.chat.talk import ChatOptions
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import conversation
from lowmem_rlhf.recipe.lora_shape import LoraShape
from lowmem_rlhf.training.optimizer import Optimizer
from lowmem_rlhf.training.roles import add_roles
from lowmem_rlhf.training.trained_state import FileStore, HostStore, StateKeeper

# four steps of two optimizer steps; the reference moves after optimizer steps 3 and 6, both within a step's iterations
OFTEN = {"sync_ref_model": True, "ref_model_sync_steps": 3, "num_iterations": 2}


def changes(base, role):
    """Return a role's change of every layer, dense and in fp64."""
    pairs = [(*layer.masters(role), layer.scaling[role]) for layer in base.adapter_layers()]
    return [scaling * b.detach().double() @ a.detach().double() for a, b, scaling in pairs]


@torch.no_grad()
def close(one, other, limit=1e-6):
    return all(float((a - b).norm()) <= limit * float(b.norm()) for a, b in zip(one, other, strict=True))


def stop_after(monkeypatch, call, error):
    """Let the optimizer's step of this number raise once it is done, the first time that it is reached."""
    real, calls = Optimizer.step, iter(range(1, 10**6))

    def stopping(self, *args, **given):
        norm = real(self, *args, **given)
        if next(calls) == call:
            raise error
        return norm

    monkeypatch.setattr(Optimizer, "step", stopping)


@pytest.fixture(scope="module")
def recipe(model_folder):
    return recipe_of(model_folder, grpo={**OFTEN, "ref_model_rank_multiple": 1}, training={"save_steps": 2})


@pytest.fixture(scope="module")
def uninterrupted(recipe, tmp_path_factory):
    """Return the trainer of a finished run whose second move is cut to the rank, and its run."""
    trainer = trainer_of(recipe, tmp_path_factory.mktemp("runs") / "whole")
    train(trainer)
    return trainer


def reference_of(run):
    return load_file(run.path / "checkpoints" / "step-4" / "reference" / "adapter_model.safetensors")


def same_run(one, other):
    first, second = learned(one), learned(other)
    tensors = [first.pop("adapter"), second.pop("adapter")], [reference_of(one), reference_of(other)]
    return first == second and all(a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a) for a, b in tensors)


# To where and when


def test_it_moves_when_and_to_where_trls_callback_moves_dense_weights(model_folder, tmp_path, monkeypatch):
    recipe = recipe_of(model_folder, grpo=OFTEN)
    trainer = trainer_of(recipe, tmp_path / "run")
    base, real, seen = trainer.base, Optimizer.step, []
    target = nn.ParameterList([torch.zeros_like(one) for one in changes(base, POLICY)])
    callback = SyncRefModelCallback(target, None)
    args = SimpleNamespace(ref_model_sync_steps=3, ref_model_mixup_alpha=0.6)  # TRL's alpha

    def step(self, *given, **named):
        seen.append(close(changes(base, REFERENCE), target))
        norm = real(self, *given, **named)
        state = SimpleNamespace(global_step=len(seen))
        callback.on_step_end(args, state, None, model=nn.ParameterList(changes(base, POLICY)))
        return norm

    monkeypatch.setattr(callback, "sync_target_model", SyncRefModelCallback._sync_target_model)
    monkeypatch.setattr(Optimizer, "step", step)
    train(trainer)
    assert seen == [True] * 8 and close(changes(base, REFERENCE), target)
    assert not close(changes(base, REFERENCE), changes(base, POLICY), 0.1)
    rows = trainer.run.metrics()
    assert [row.get("ref_model/lost") for row in rows] == [None, 0, 0, None]
    assert rows[2]["kl"] > 0


def test_the_kl_is_that_from_the_reference_as_it_is(model_folder, tmp_path):
    copied = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    still, moving = (
        trainer_of(recipe_of(model_folder, grpo=grpo), tmp_path / str(n)) for n, grpo in enumerate([{}, copied])
    )
    for trainer in (still, moving):
        train(trainer)
    (_, *later), (_, *copies) = still.run.metrics(), moving.run.metrics()
    assert min(row["kl"] for row in later) > 1e-4 > 1e-8 > max(row["kl"] for row in copies)


def test_where_it_never_moves_that_is_said_and_the_run_is_the_one_without(model_folder, tmp_path):
    found = []
    for name, grpo in (("with", {"sync_ref_model": True}), ("without", {})):
        trainer = trainer_of(recipe_of(model_folder, grpo=grpo), tmp_path / name)
        _, said = train(trainer)
        found.append(learned(trainer.run))
        remark = "grpo.ref_model_sync_steps=512 is more than the run's 4 optimizer steps: the reference never moves"
        assert any(sentence.startswith(remark) for sentence in said) == (name == "with")
    adapters = [one.pop("adapter") for one in found]
    assert found[0] == found[1] and all(adapters[0][key].equal(adapters[1][key]) for key in adapters[0])


def test_it_begins_as_the_adapter_that_the_run_goes_on_from(uninterrupted, recipe, model_folder):
    start = uninterrupted.run.path
    went_on = recipe_of(model_folder, adapter=str(start), grpo=OFTEN)
    base = base_of_recipe(went_on)
    add_roles(base, went_on, [])
    assert INITIAL not in base.roles and base.roles[REFERENCE] == (REFERENCE,)
    assert close(changes(base, REFERENCE), changes(uninterrupted.base, POLICY))
    assert following.Follower(went_on).mixed == 1
    wanted = [0.4 * one for one in changes(base, POLICY)]
    with torch.no_grad():
        for parameter in base.trainable().values():
            parameter.add_(0.05)
    mix_into_reference(base, 0.6, following.Follower(went_on).mixed)
    assert close(changes(base, REFERENCE), [a + 0.6 * b for a, b in zip(wanted, changes(base, POLICY), strict=True)])


def base_of_recipe(recipe):
    return SharedBase.load(recipe.model, torch.device("cpu"), "none", "float32", r=4, lora_alpha=8)


# Nothing is lost


@pytest.mark.parametrize("call", [3, 6])  # the optimizer step after which the reference moves, of steps 2 and 3
def test_a_resumed_run_is_the_uninterrupted_one(recipe, tmp_path, monkeypatch, uninterrupted, call):
    assert uninterrupted.run.metrics()[2]["ref_model/lost"] > 1e-3  # cut to the rank
    trainer = trainer_of(recipe, tmp_path / "run")
    with monkeypatch.context() as patch:
        real, calls = following.mix_into_reference, iter(range(1, 10))

        def moved(*args):
            lost = real(*args)
            if next(calls) == call // 3:
                raise KeyboardInterrupt
            return lost

        patch.setattr(following, "mix_into_reference", moved)
        with pytest.raises(KeyboardInterrupt):
            train(trainer)
    resumed = trainer_of(recipe, tmp_path / "run", resume=True)
    assert resumed.step == call // 3
    train(resumed)
    assert same_run(resumed.run, uninterrupted.run)


def test_a_step_that_is_taken_once_more_takes_the_reference_back(recipe, tmp_path, monkeypatch, uninterrupted):
    trainer = trainer_of(recipe, tmp_path / "run")
    stop_after(monkeypatch, 4, torch.OutOfMemoryError("out of memory"))  # of step 2, behind the first move
    _, said = train(trainer)
    assert any("memory" in sentence for sentence in said)
    for row in (rows := trainer.run.metrics()):
        row.pop("memory/retries", None)
    assert [row["kl"] for row in rows] == [row["kl"] for row in uninterrupted.run.metrics()]
    assert all(tensor.equal(reference_of(trainer.run)[key]) for key, tensor in reference_of(uninterrupted.run).items())


@pytest.mark.parametrize("store", [FileStore, HostStore])
def test_the_reference_is_kept_once_it_has_moved_and_put_back(tmp_path, monkeypatch, store):
    base = base_of()
    base.add_following(LoraShape.of(4, 8), 2)
    keeper = StateKeeper(stepper_of(base.trainable()), torch.device("cpu"), tmp_path, base.following())
    puts, real = [], store.put
    monkeypatch.setattr(store, "put", lambda self, tensors: (puts.append(len(tensors)), real(self, tensors))[1])
    if store is HostStore:
        keeper._store, keeper._store_of_following = HostStore(torch.device("cpu")), HostStore(torch.device("cpu"))
    mix_into_reference(base, 0.6, 0)
    for step in range(3):
        keeper.keep(step, {})
    assert len(puts) == 4  # what trains three times, the reference once
    before = changes(base, REFERENCE)
    mix_into_reference(base, 0.6, 1)
    assert not close(changes(base, REFERENCE), before)
    keeper.put_back()
    assert all(a.equal(b) for a, b in zip(changes(base, REFERENCE), before, strict=True))
    keeper.keep(3, {})
    assert len(puts) == 6


def test_checkpoints_hold_the_reference_as_an_adapter_and_the_finished_run_does_not(uninterrupted):
    run = uninterrupted.run
    config = json.loads((run.path / "checkpoints" / "step-4" / "reference" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and not config["use_rslora"]
    saved, live = reference_of(run), uninterrupted.base.adapter_state(REFERENCE)
    assert saved.keys() == live.keys() and all(saved[key].equal(live[key]) for key in saved)
    folder = run.path / "adapter"
    assert {path.name for path in folder.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not (folder / "reference").exists()


def test_a_finished_run_is_compared_with_what_it_began_as(uninterrupted):
    with conversation(OpenRun.at(uninterrupted.run, None), None, ChatOptions(compare=True)) as talk:
        assert talk.base.roles[REFERENCE] == () and not talk.base.follows
        assert close(changes(talk.base, POLICY), changes(uninterrupted.base, POLICY))


# What is refused


def test_without_a_kl_term_there_is_no_reference_that_could_move():
    with pytest.raises(ValueError, match=r"sync_ref_model: got true with beta 0, .*; set beta above 0"):
        settings_of(sync_ref_model=True)
    assert settings_of(sync_ref_model=True, beta=0.04).ref_model_mixup_alpha == 0.6
    for wrong in ({"ref_model_mixup_alpha": 0}, {"ref_model_mixup_alpha": 1.1}, {"ref_model_sync_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings_of(**wrong)
