"""The adapter layer: the same sums as stock peft, in the base's 16-bit dtype, from fp32 masters."""

import pytest
import torch
from peft import PeftModel
from tiny_models import CPU, ragged_groups, tiny_base
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from lowmem_rlhf.engine.attention import PackedContext
from lowmem_rlhf.engine.packing import pack
from lowmem_rlhf.engine.passes import packed_logprobs
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import UserError

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "matmul", "linear", "addmv", "dot")


class Products(TorchDispatchMode):
    """Collects the input dtypes of all matrix products and fused attentions (outer products, as in RoPE, aside)."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves(args) if torch.is_tensor(x) and x.is_floating_point() and x.ndim >= 2]
        if "scaled_dot_product" in name:
            self.dtypes.append((name, {x.dtype for x in tensors[:3]}))
        elif name in PRODUCTS and tensors[-1].shape[-2] > 1:
            self.dtypes.append((name, {x.dtype for x in tensors[-2:]}))
        return func(*args, **(kwargs or {}))

    def with_fp32(self):
        return [product for product in self.dtypes if torch.float32 in product[1]]


def hidden_states(base, packed):
    return base.hidden_states(packed.input_ids, packed.position_ids, PackedContext(packed.buckets, CPU))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_layer_adds_scaling_b_a_to_the_dense_weight(family):
    base, stock = tiny_base(family)
    with torch.no_grad():
        for layer_name, layer in base.model.named_modules():
            if layer in list(base.adapter_layers()):
                target = stock.get_submodule(layer_name)
                delta = 2.0 * layer.lora_B[POLICY].weight @ layer.lora_A[POLICY].weight  # alpha 8 / r 4
                target.weight.add_(delta.t() if isinstance(target, Conv1D) else delta)
        ids = torch.tensor([ragged_groups()[0].prompt])
        want = stock(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        with base.role(POLICY):
            got = hidden_states(base, pack(ragged_groups()[:1], CPU))[: ids.shape[1]]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_16_bit_step_has_no_fp32_product(load_tiny, quantization, checkpointing):
    base = load_tiny(quantization)
    base.set_gradient_checkpointing(checkpointing)
    packed = pack(ragged_groups(), CPU)
    with Products() as seen, base.role(POLICY):
        logps, entropies = packed_logprobs(base, packed, 0.9, 8)
        forward = len(seen.dtypes)
        (logps.sum() + 0.1 * entropies.sum()).backward()
    layers = len(list(base.adapter_layers()))
    assert forward >= 2 * layers
    assert len(seen.dtypes) - forward >= 4 * layers
    assert seen.with_fp32() == []
    for name, p in base.trainable().items():
        assert p.dtype == torch.float32, name
        assert p.grad.dtype == torch.float32, name
        assert p.grad.abs().sum() > 0, name


def test_stock_peft_does_have_fp32_products(tmp_path):
    """The control: the measurement above sees them."""
    base, stock = tiny_base("llama", dtype=torch.bfloat16)
    base.save_adapter(tmp_path)
    stock = PeftModel.from_pretrained(stock, tmp_path)
    with Products() as seen, torch.no_grad():
        stock(input_ids=torch.tensor([[5, 6, 7]]))
    assert len(seen.with_fp32()) >= len(list(base.adapter_layers()))


def test_16_bit_gradients_agree_with_fp32(load_tiny):
    packed = pack(ragged_groups(), CPU)
    gradients = {}
    for dtype in ("float32", "bfloat16"):
        base = load_tiny("none", dtype)
        with base.role(POLICY):
            packed_logprobs(base, packed, 1.0, 8)[0].sum().backward()
        gradients[dtype] = torch.cat([p.grad.flatten() for p in base.trainable().values()])
    assert torch.nn.functional.cosine_similarity(*gradients.values(), dim=0) > 0.995
    assert float(gradients["bfloat16"].norm() / gradients["float32"].norm()) == pytest.approx(1, abs=0.05)


def test_a_change_in_place_reaches_the_16_bit_copies():
    base, _ = tiny_base("llama", dtype=torch.bfloat16)
    packed = pack(ragged_groups(), CPU)
    parameter = next(p for name, p in base.trainable().items() if "lora_B" in name)
    with base.role(POLICY), torch.no_grad():
        first = hidden_states(base, packed)
        assert torch.equal(hidden_states(base, packed), first)
        parameter.add_(1.0)
        second = hidden_states(base, packed)
        assert not torch.equal(second, first)
        parameter.data = parameter.data - 1.0  # what version counters do not see
        base.adapters_changed()
        third = hidden_states(base, packed)
        assert not torch.equal(third, second)
        assert float((third - first).float().norm() / first.float().norm()) < 0.02


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_saved_adapter_gives_equal_logits_in_stock_peft(family, tmp_path):
    base, stock = tiny_base(family)
    base.save_adapter(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    stock = PeftModel.from_pretrained(stock, tmp_path)
    assert stock.peft_config["default"].base_model_name_or_path == f"tiny/{family}"
    prompt = ragged_groups()[0].prompt
    packed = pack(ragged_groups()[:1], CPU)
    with torch.no_grad(), base.role(POLICY):
        got = base.head.logits(hidden_states(base, packed)[: len(prompt)]).float()
        want = stock(input_ids=torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_load_adapter_is_the_inverse_of_save_adapter(tmp_path):
    base, _ = tiny_base("llama", dtype=torch.bfloat16)
    other, _ = tiny_base("llama", dtype=torch.bfloat16, adapter=0.0)
    packed = pack(ragged_groups(), CPU)
    base.save_adapter(tmp_path)
    with base.role(POLICY), other.role(POLICY), torch.no_grad():
        assert not torch.equal(hidden_states(other, packed), hidden_states(base, packed))
        other.load_adapter(tmp_path)
        assert torch.equal(hidden_states(other, packed), hidden_states(base, packed))
    assert all(torch.equal(a, b) for a, b in zip(base.trainable().values(), other.trainable().values(), strict=True))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in other.trainable().values())


def test_an_adapter_of_another_base_is_refused(tmp_path):
    base, _ = tiny_base("llama")
    base.save_adapter(tmp_path)
    wider, _ = tiny_base("llama", intermediate_size=80)
    deeper, _ = tiny_base("llama", num_hidden_layers=3)
    for other in (wider, deeper):
        before = {name: p.detach().clone() for name, p in other.trainable().items()}
        with pytest.raises(UserError, match="does not fit this base"):
            other.load_adapter(tmp_path)
        assert all(torch.equal(before[name], p) for name, p in other.trainable().items())
