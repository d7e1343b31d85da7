"""The state of the last finished step, outside the device: it is what a checkpoint holds, and can be put back."""

import pytest
import torch
from safetensors.torch import load_file
from training_cases import base_of, stepper_of

from lowmem_rlhf.engine.roles import CRITIC
from lowmem_rlhf.training import trained_state
from lowmem_rlhf.training.optimizer import Optimizer
from lowmem_rlhf.training.trained_state import FileStore, HostStore, StateKeeper

CPU = torch.device("cpu")


def a_base():
    base = base_of()
    base.add_role(CRITIC, 4, 8, "all-linear", seed=3)
    base.add_head(CRITIC, bias=True)
    return base


def take_steps(optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        for p in optimizer.parameters.values():
            p.grad += torch.randn(p.shape, generator=generator)
        optimizer.step()


def everything(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    live = {**optimizer.parameters, **optimizer.tensors()}
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(params=[FileStore, HostStore])
def keeper_of(request, tmp_path, monkeypatch):
    """Return what makes a keeper, with the store of a CPU or of a card."""

    def make(optimizer: Optimizer) -> StateKeeper:
        keeper = StateKeeper(optimizer, CPU, tmp_path)
        keeper._store = request.param(tmp_path if request.param is FileStore else CPU)
        return keeper

    return make


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("kept_at", [0, 2])
def test_what_has_begun_is_taken_back_bit_for_bit(keeper_of, optim, kept_at):
    base = base_of(hidden_size=64)
    optimizer = stepper_of(base.trainable(), optim, total=9, warmup_steps=4, scale_loss=optim == "adamw")
    keeper = keeper_of(optimizer)
    take_steps(optimizer, 0, kept_at)
    keeper.keep(kept_at, {"learned_tokens": 7})
    before, plain, rate = everything(optimizer), optimizer.plain(), optimizer.learning_rate
    take_steps(optimizer, kept_at, 5)
    assert not same(before, everything(optimizer))
    state = keeper.put_back()
    assert (state.step, state.counters) == (kept_at, {"learned_tokens": 7})
    assert same(before, everything(optimizer)) and optimizer.plain() == plain and optimizer.learning_rate == rate
    take_steps(optimizer, kept_at, 5)
    other = stepper_of(base_of(hidden_size=64).trainable(), optim, total=9, warmup_steps=4, scale_loss=optim == "adamw")
    take_steps(other, 0, 5)
    assert same(everything(optimizer), everything(other))


def test_the_kept_state_makes_the_files_that_the_base_would(keeper_of, tmp_path):
    base = a_base()
    optimizer = stepper_of(base.trainable())
    take_steps(optimizer, 0, 2)
    keeper = keeper_of(optimizer)
    keeper.keep(2, {})
    for role in ("policy", CRITIC):
        base.save_adapter(tmp_path / "live" / role, role)
    take_steps(optimizer, 2, 3)
    parameters = keeper.state().parameters
    for role in ("policy", CRITIC):
        base.save_adapter(tmp_path / "kept" / role, role, parameters)
    files = sorted(path.relative_to(tmp_path / "live") for path in (tmp_path / "live").rglob("*.*"))
    assert len(files) == 5  # two adapters with their configurations, a head
    for file in files:
        assert (tmp_path / "live" / file).read_bytes() == (tmp_path / "kept" / file).read_bytes(), file
    head = load_file(tmp_path / "kept" / CRITIC / "head.safetensors")
    assert list(head) == ["bias", "weight"]


def test_the_file_of_the_state_has_no_name(tmp_path):
    optimizer = stepper_of(base_of().trainable())
    keeper = StateKeeper(optimizer, CPU, tmp_path)
    keeper.keep(0, {})
    assert keeper.step == 0 and not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_state_in_memory(tmp_path, monkeypatch, caplog):
    def full(self, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trained_state.FileStore, "put", full)
    optimizer = stepper_of(base_of().trainable())
    keeper, before = StateKeeper(optimizer, CPU, tmp_path), everything(optimizer)
    keeper.keep(0, {})
    take_steps(optimizer, 0, 2)
    keeper.put_back()
    assert same(before, everything(optimizer))
    assert "cannot be kept in" in caplog.text and "No space left" in caplog.text


def test_while_a_state_is_replaced_there_is_none(tmp_path, monkeypatch):
    optimizer = stepper_of(base_of().trainable())
    keeper = StateKeeper(optimizer, CPU, tmp_path)
    keeper.keep(1, {})
    monkeypatch.setattr(FileStore, "put", lambda self, tensors: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        keeper.keep(2, {})
    assert keeper.step is None
    with pytest.raises(RuntimeError, match="no state of a finished step"):
        keeper.state()
