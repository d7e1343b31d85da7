"""One copy of the base; roles are states of it; the reference is the untouched base exactly."""

import gc
import warnings

import pytest
import torch
from tiny_models import CPU, fill_adapter, ragged_groups, tiny_base, tiny_model, tiny_tokenizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError

pytestmark = pytest.mark.long

PRECISIONS = [("nf4", "bfloat16"), ("nf4", "float32"), ("nf4", "float16"), ("int8", "float16"), ("int8", "bfloat16")]
PRECISIONS += [("none", "bfloat16"), ("none", "float16"), ("none", "float32")]


def tensors_of(module):
    """Yield all tensors that a module holds: parameters, buffers, and the tensors of bitsandbytes' states."""
    for child in module.modules():
        for _, p in child.named_parameters(recurse=False):
            yield p.data
            yield from quantization_tensors(getattr(p, "quant_state", None))
            yield from (x for x in (getattr(p, "CB", None), getattr(p, "SCB", None)) if x is not None)
        yield from (b for _, b in child.named_buffers(recurse=False))
        state = getattr(child, "state", None)
        yield from (x for x in (getattr(state, "CB", None), getattr(state, "SCB", None)) if x is not None)


def quantization_tensors(state):
    if state is not None:
        yield from (x for x in vars(state).values() if torch.is_tensor(x))
        yield from quantization_tensors(state.state2)


def storages(module):
    """Return the bytes of every storage of a module, by address."""
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(module)}


def train_step(base, packed):
    with base.role(POLICY):
        logps, _ = packed_logprobs(base, packed, 1.0, 8)
        logps.sum().backward()
    with torch.no_grad():
        for p in base.trainable().values():
            p.add_(p.grad, alpha=1e-3)
    base.adapters_changed()
    base.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "bfloat16"), ("int8", "float16"), ("none", "bfloat16")])
def test_there_is_one_copy_of_the_base(tiny_folder, quantization, dtype):
    model, tokenizer = load_base(str(tiny_folder), quantization, dtype, CPU)
    with torch.no_grad():  # int8 layers move their weight into their state when they first run
        model.train()(input_ids=torch.tensor([[5, 6]]))
    before = storages(model)
    base = SharedBase(model, tokenizer, "tiny", r=4)
    fill_adapter(base)
    packed = pack(ragged_groups(), CPU)
    weights = {p.data_ptr() for p in base.trainable().values()}
    for _ in range(2):
        train_step(base, packed)
        with base.role("reference"), torch.no_grad():
            packed_logprobs(base, packed, 1.0, 8)
        now = storages(base)
        assert {k: v for k, v in now.items() if k not in weights} == before
    assert sum(now.values()) - sum(before.values()) == sum(4 * p.numel() for p in base.trainable().values())

    sizes = {layer.in_features * layer.out_features for layer in base.adapter_layers()}
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alive = [x for x in gc.get_objects() if torch.is_tensor(x) and x.is_floating_point() and x.numel() in sizes]
    allowed = {p.data_ptr() for p in base.model.parameters()}
    mine = {tuple(layer.base_layer.weight.shape) for layer in base.adapter_layers()} | {
        (layer.out_features, layer.in_features) for layer in base.adapter_layers()
    }
    if quantization != "none":
        assert not [x.shape for x in alive if tuple(x.shape) in mine and x.data_ptr() not in allowed]


class LiveCopies(TorchDispatchMode):
    """Counts the live floating-point storages that are as large as a weight, after every operation."""

    def __init__(self, shapes, known):
        super().__init__()
        self.shapes, self.known, self.live, self.most, self.made = shapes, known, [], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not torch.is_tensor(x) or not x.is_floating_point() or tuple(x.shape) not in self.shapes:
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() in self.known or any(r == StorageWeakRef(storage) for r in self.live):
                continue
            self.live.append(StorageWeakRef(storage))
            self.made += 1
        self.live = [ref for ref in self.live if not ref.expired()]
        self.most = max(self.most, len(self.live))
        return out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_dequantized_weight_outlives_its_product(load_tiny, checkpointing):
    base = load_tiny("nf4")
    base.set_gradient_checkpointing(checkpointing)
    shapes = {(layer.out_features, layer.in_features) for layer in base.adapter_layers()}
    shapes |= {(n, m) for m, n in shapes}
    packed = pack(ragged_groups(), CPU)
    assert packed.input_ids.numel() not in {size for shape in shapes for size in shape}
    with LiveCopies(shapes, set(storages(base))) as seen:
        train_step(base, packed)
    assert seen.made >= len(list(base.adapter_layers())) - 3  # the backward pass, less the first q, k and v
    assert seen.most <= 3
    del packed
    gc.collect()
    assert not [ref for ref in seen.live if not ref.expired()]


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS)
def test_the_reference_is_the_untouched_base_exactly(tiny_folder, load_tiny, quantization, dtype):
    base = load_tiny(quantization, dtype)
    packed = pack(ragged_groups(), CPU)
    train_step(base, packed)
    untouched, _ = load_base(str(tiny_folder), quantization, dtype, CPU)
    untouched.set_attn_implementation("lowmem")
    untouched.train()  # in eval mode bitsandbytes repacks 4-bit weights for another, rounder, kernel of the CPU

    def run(decoder):
        context = PackedContext(packed.buckets, CPU)
        with torch.no_grad():
            return decoder(
                input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, lowmem_context=context
            ).last_hidden_state[0]

    want = run(untouched.model)
    with base.role("reference"), torch.no_grad():
        got = base.hidden_states(packed.input_ids, packed.position_ids, PackedContext(packed.buckets, CPU))
        logits = base.head.logits(got).float()
    assert got.dtype == getattr(torch, dtype)
    assert torch.equal(got, want)
    assert torch.equal(logits, untouched.lm_head(want).detach().float())
    with base.role(POLICY):
        assert not torch.equal(run(base.decoder), want)
        with base.role("reference"):
            assert torch.equal(run(base.decoder), want)
        assert not torch.equal(run(base.decoder), want)  # the outer role is back
    assert torch.equal(run(base.decoder), want)  # and outside of every role there is no adapter


def test_a_new_policy_equals_the_reference_and_its_b_is_zero():
    base, _ = tiny_base("llama", adapter=0.0)
    packed = pack(ragged_groups(), CPU)
    values = {}
    for role in (POLICY, "reference"):
        with base.role(role):
            values[role] = packed_logprobs(base, packed, 1.0, 8)[0]
    assert torch.equal(values[POLICY], values["reference"])
    assert values[POLICY].requires_grad
    assert not values["reference"].requires_grad
    for name, p in base.trainable().items():
        assert bool(p.any()) == ("lora_A" in name)
    with pytest.raises(KeyError), base.role("nobody"):
        pass


def test_the_role_is_left_when_the_block_fails():
    base, _ = tiny_base("llama")
    with pytest.raises(ZeroDivisionError), base.role(POLICY):
        raise ZeroDivisionError
    assert base.active.names == ()


def test_only_the_adapter_trains():
    base, _ = tiny_base("gpt2")
    trainable = base.trainable()
    assert all("lora_" in name for name in trainable)
    assert all(p.requires_grad == (name in trainable) for name, p in base.peft.named_parameters())
    assert len(trainable) == 2 * len(list(base.adapter_layers())) == 2 * 2 * 4  # c_attn, c_proj, c_fc, c_proj
    for p in trainable.values():
        p.requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing would be learned"):
        base.trainable()


def test_the_seed_fixes_the_adapter_and_leaves_the_global_generator_alone():
    def first(seed):
        torch.manual_seed(99)
        base = SharedBase(tiny_model("llama"), tiny_tokenizer(), "tiny", r=4, seed=seed)
        return next(iter(base.trainable().values())).detach(), torch.rand(1)

    (a, x), (b, y), (c, z) = first(1), first(1), first(2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.manual_seed(99)
    tiny_model("llama")
    assert x == y == z == torch.rand(1)


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama"])
def test_dropout_is_off(family):
    changes = {
        "gpt2": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
        "phi": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attention_dropout": 0.4},
        "llama": {"attention_dropout": 0.4},
    }[family]
    base, _ = tiny_base(family, **changes)
    packed = pack(ragged_groups(), CPU)
    values = []
    for _ in range(2):
        with base.role(POLICY):
            values.append(packed_logprobs(base, packed, 1.0, 8)[0].detach())
    assert torch.equal(*values)


def test_stop_ids_are_those_of_generation_config_config_and_tokenizer():
    model = tiny_model("llama", eos_token_id=[3, 4])
    model.generation_config.eos_token_id = [3, 7]
    assert SharedBase(model, tiny_tokenizer(9), "tiny").stop_ids == {3, 4, 7, 9}
    model = tiny_model("llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    assert SharedBase(model, tiny_tokenizer(None), "tiny").stop_ids == frozenset()


def test_target_modules_that_fit_nothing_are_refused():
    with pytest.raises(UserError, match="target_modules"):
        SharedBase(tiny_model("llama"), tiny_tokenizer(), "tiny", target_modules=["no_such_layer"])


def test_the_output_head_has_no_adapter():
    base, _ = tiny_base("llama")
    assert base.head.module is base.model.get_output_embeddings()
    assert "lm_head" not in " ".join(base.trainable())


def test_smollm2_in_nf4_is_small_and_its_reference_exact(smollm2_nf4):
    """The real model: 105 MB, not 270; log-probs of a fluent sentence are better than those of a shuffled one."""
    base = smollm2_nf4
    adapters = sum(4 * p.numel() for p in base.trainable().values())
    assert 60e6 < sum(storages(base).values()) - adapters < 120e6
    tokens = base.tokenizer("The capital of France is Paris, and the capital of Germany is Berlin.").input_ids
    from lowmem_rlhf.engine.packing import Group

    packed = pack([Group(tokens[:4], [tokens[4:], tokens[:3:-1]], [0, 1])], CPU)
    before = set(storages(base))
    with base.role("reference"), torch.no_grad():
        logps, entropies = packed_logprobs(base, packed, 1.0, 8)
    fluent, shuffled = logps.split(packed.lengths)
    assert fluent.mean() > shuffled.mean() + 2
    assert torch.isfinite(entropies).all()
    train_step(base, packed)
    assert set(storages(base)) == before
    with base.role("reference"), torch.no_grad():
        assert torch.equal(packed_logprobs(base, packed, 1.0, 8)[0], logps)
