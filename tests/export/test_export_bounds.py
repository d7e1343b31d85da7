"""What the bounds of an export refuse: models, adapters and files that were broken on purpose; and what they let pass.

The tiny models have norms as real ones have them (means of 5 to 30, negative ones, outliers), since near its first
values a wrong form of a norm hardly shows.
"""

import json
from dataclasses import replace

import pytest
import torch
from export_cases import CPU, SAMPLES, change_tensors, make_run, save_model
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny_runs import write_jsonl

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.roles import POLICY
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.export import Export
from lowmem_rlhf.export.gguf import write as gguf
from lowmem_rlhf.export.merging import run as merging
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.export.proof import outputs
from lowmem_rlhf.export.proof.storage import as_stored, furthest_row, stored_kind

WRONG_LIVE = "the live policy is not what stock transformers and peft compute"


def realistic_norms(tensors):
    """Return a model's tensors with the weights of its layers' norms drawn as a trained model has them."""
    generator, changed = torch.Generator().manual_seed(1), dict(tensors)
    for name, weight in tensors.items():
        if "norm" in name and weight.ndim == 1 and ".layers." in name:
            mean = 5 + 25 * torch.rand(1, generator=generator)
            drawn = mean * (1 + 0.3 * torch.randn(weight.shape, generator=generator))
            drawn[torch.rand(weight.shape, generator=generator) < 0.05] *= -0.2
            drawn[torch.rand(weight.shape, generator=generator) < 0.03] *= 3
            changed[name] = drawn
    return changed


def save_realistic(family, folder, **changes):
    save_model(family, folder, **changes)
    change_tensors(folder, realistic_norms)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return save_realistic("gemma", tmp_path_factory.mktemp("gemma") / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = save_realistic("llama", tmp_path_factory.mktemp("llama") / "model")
    return make_run(model.parent / "run", model, 0.05, "nf4", "bfloat16")


@pytest.fixture(scope="module", params=[("nf4", "bfloat16"), ("none", "float32")], ids=["nf4", "fp32"])
def run(request, gemma, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "run", gemma, 0.05, *request.param)


def norm_without_its_one(base):
    """Multiply by w what is to be multiplied by 1 + w, or the other way round."""
    for module in base.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            shift = 0.0 if "Gemma" in type(module).__name__ else 1.0
            eps = getattr(module, "eps", None) or module.variance_epsilon
            module.forward = lambda x, m=module, s=shift, e=eps: torch.nn.functional.rms_norm(
                x.float(), x.shape[-1:], m.weight.float() + s, e
            ).to(x.dtype)


def one_norm_without_its_one(base):
    norms = [m for m in base.model.modules() if type(m).__name__.endswith("RMSNorm")]
    right = [m.forward for m in norms]
    norm_without_its_one(base)
    for module, forward in list(zip(norms, right, strict=True))[1:]:
        module.forward = forward


def head_scale(base):
    base.head = replace(base.head, scale=1.1)


def rotary(base):
    base.model.model.rotary_emb.inv_freq.mul_(1.05)


def rope_by_pairs(base):
    """Turn neighbours where halves are to be turned: the cosines come in another order."""
    rotary = base.model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda *args, **kwargs: tuple(
        one[..., : one.shape[-1] // 2].repeat_interleave(2, -1) for one in forward(*args, **kwargs)
    )


def attention_sees_the_next(base):
    from lowmem_rlhf.engine.attention import PackedContext

    attend = PackedContext.attend

    def shifted(self, layer, q, k, v, *rest):
        return attend(self, layer, q, k.roll(-1, 1), v.roll(-1, 1), *rest)

    base.states = lambda batch, states=base.states: _with(PackedContext, "attend", shifted, states, batch)


def adapter_scaling(base):
    for layer in base.adapter_layers():
        layer.scaling[POLICY] *= 1.2
    base.adapters_changed()


def _with(owner, name, value, call, *args):
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        return call(*args)
    finally:
        setattr(owner, name, kept)


LIVE_FAULTS = [
    norm_without_its_one,
    one_norm_without_its_one,
    head_scale,
    rotary,
    rope_by_pairs,
    attention_sees_the_next,
    adapter_scaling,
]


def break_live(monkeypatch, fault):
    """Break the live policy once it is open, behind any check at its load."""
    opened = outputs.open_trained

    def broken(*args):
        base = opened(*args)
        fault(base)
        return base

    monkeypatch.setattr(outputs, "open_trained", broken)


@pytest.mark.parametrize("fault", LIVE_FAULTS)
def test_a_wrong_live_policy_is_not_exported(fault, run, monkeypatch):
    break_live(monkeypatch, fault)
    with pytest.raises(RunError, match=WRONG_LIVE):
        Export(run, ExportOptions()).make()
    assert not (run.path / "export" / "merged").exists()


@pytest.mark.parametrize("options", [{"format": "adapter"}, {"onto": "original"}, {"format": "gguf"}])
def test_a_wrong_live_policy_is_refused_in_every_format(options, run, monkeypatch):
    break_live(monkeypatch, one_norm_without_its_one)
    with pytest.raises(RunError, match=WRONG_LIVE):
        Export(run, ExportOptions(**options)).make()


def break_merged(monkeypatch, change):
    """Break the merged folder once it is written."""
    written = merging.copy_side_files

    def broken(source, folder, *rest):
        written(source, folder, *rest)
        change(folder)

    monkeypatch.setattr(merging, "copy_side_files", broken)


def not_merged(monkeypatch):
    factors = LoraFile.factors
    monkeypatch.setattr(LoraFile, "factors", lambda *args: tuple(0 * factor for factor in factors(*args)))


def merged_twice(monkeypatch):
    factors = LoraFile.factors

    def twice(self, layer, *rest):
        left, right = factors(self, layer, *rest)
        return (2 * left if layer.endswith("layers.0.self_attn.v_proj") else left), right

    monkeypatch.setattr(LoraFile, "factors", twice)


def one_left_out(monkeypatch):
    factors = LoraFile.factors

    def none(self, layer, *rest):
        left, right = factors(self, layer, *rest)
        return (0 * left if layer.endswith("layers.0.self_attn.v_proj") else left), right

    monkeypatch.setattr(LoraFile, "factors", none)


def swapped(monkeypatch):
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    break_merged(monkeypatch, lambda folder: change_tensors(folder, lambda t: t | {first: t[second], second: t[first]}))


MERGE_FAULTS = {
    not_merged: "has lost what training changed|keeps only",
    merged_twice: "the merged model, loaded again, is not",
    one_left_out: "the merged model, loaded again, is not",
    swapped: "the merged model, loaded again, is not|has lost what training changed",
}


@pytest.mark.parametrize("onto", ["quantized", "original"])
@pytest.mark.parametrize("fault", MERGE_FAULTS)
def test_a_wrong_merge_is_not_kept(fault, onto, run, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(RunError, match=MERGE_FAULTS[fault]):
        Export(run, ExportOptions(onto=onto, dtype="float16")).make()


@pytest.mark.parametrize(
    ("fault", "kind"), [("permuted", "f16"), ("two rows", "q8_0"), ("permuted", "q4_k_m"), ("a row twice", "q4_k_m")]
)
def test_a_wrong_gguf_is_not_kept(fault, kind, llama, monkeypatch):
    written = gguf.write_gguf

    def broken(folder, target, *rest):
        written(folder, target, *rest)
        with target.open("rb+") as file:
            tensor = next(t for t in GGUFReader(target, "r").tensors if t.name == "blk.1.attn_q.weight")
            data = torch.from_numpy(tensor.data.copy())
            if fault == "permuted":
                data = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
            elif fault == "two rows":
                data[[0, 1]] = data[[1, 0]]
            else:
                data[3] = data[4]
            file.seek(tensor.data_offset)
            file.write(data.contiguous().view(torch.uint8).numpy().tobytes())

    monkeypatch.setattr(gguf, "write_gguf", broken)
    with pytest.raises(RunError, match=r"holds other numbers for model\.layers\.1\.self_attn\.q_proj\.weight"):
        Export(llama, ExportOptions(format="gguf", quantize=kind)).make()


def test_a_gguf_that_is_read_otherwise_is_refused_by_its_predictions(llama, monkeypatch):
    from lowmem_rlhf.export.gguf.tensors import Tensor

    restore = Tensor.restore
    monkeypatch.setattr(Tensor, "restore", lambda self, numbers: restore(self, numbers.flip(0)))
    with pytest.raises(RunError, match="the GGUF"):
        Export(llama, ExportOptions(format="gguf", quantize="q8_0")).make()


def test_what_is_right_passes_and_is_told_with_its_bounds(llama):
    judged = Export(llama, ExportOptions(format="gguf", quantize="q4_k_m")).make()["proof"]["judged"]
    original = "the adapter on the unquantized base in stock peft"
    stock = "stock transformers and peft, with {} arithmetic"
    assert [(one["what"], one["against"]) for one in judged] == [
        ("the live policy", stock.format("bfloat16")),
        ("the live policy", stock.format("float32")),
        ("the merged model", original),
        ("the GGUF", original),
    ]
    assert judged[1]["mean_kl_at_most"] == 1e-5
    for one in judged:
        assert one["mean_kl"] <= one["mean_kl_at_most"]
        assert one["top1_agreement"] >= one["top1_agreement_at_least"]
    folder = llama.path / "export" / "gguf"
    assert json.loads((folder / "export.json").read_text())["proof"]["judged"] == judged
    card = (folder / "README.md").read_text()
    assert "the GGUF and the adapter on the unquantized base" in card and "at most" in card


# one of every way that layers are built in NF4, and two of them in the other precisions that a plan chooses
FAMILIES = ["llama", "qwen3", "gemma3", "phi", "gpt2", "cohere", "gpt_oss", "qwen3_next"]
PRECISIONS = [("nf4", "float16"), ("int8", "float16"), ("none", "bfloat16")]


@pytest.mark.parametrize(
    ("family", "precision"),
    [(family, ("nf4", "bfloat16")) for family in FAMILIES]
    + [(family, precision) for family in ("llama", "gemma3") for precision in PRECISIONS],
)
def test_an_exact_live_policy_is_never_refused(family, precision, tmp_path):
    own = {"head_dim": 16} if family in ("qwen3", "gemma3", "gpt_oss", "qwen3_next") else {}
    run = make_run(tmp_path / "run", save_realistic(family, tmp_path / "model", **own), 0.05, *precision)
    judged = Export(run, ExportOptions(format="adapter")).make()["proof"]["judged"]
    assert len(judged) == 2 and judged[1]["mean_kl"] < 1e-6


@pytest.fixture(scope="module")
def judge(gemma, tmp_path_factory):
    """Return a reward model's run."""
    folder = tmp_path_factory.mktemp("judge")
    pairs = write_jsonl(folder / "pairs.jsonl", [{"prompt": t, "chosen": t, "rejected": "no"} for t in SAMPLES * 2])
    data = {"train": str(pairs), "chosen": "chosen", "rejected": "rejected", "prompt": "prompt", "answer": None}
    changes = {"algorithm": "reward_model", "rewards": [], "data": data | {"template": None, "train_size": None}}
    base = SharedBase.load(str(gemma), CPU, "nf4", "bfloat16", r=4, lora_alpha=8)
    base.add_head(POLICY, std=0.2)
    return make_run(folder / "run", gemma, 0.05, "nf4", "bfloat16", samples=[], base=base, **changes)


def test_a_reward_model_is_held_against_stock(judge):
    judged = Export(judge, ExportOptions()).make()["proof"]["judged"]
    assert [one["against"].rsplit(" with ")[-1] for one in judged] == ["float32 arithmetic", "bfloat16 arithmetic"]
    assert all(one["largest_score_difference"] <= one["largest_score_difference_at_most"] for one in judged)


@pytest.mark.parametrize("fault", [one_norm_without_its_one, rotary, adapter_scaling])
def test_a_wrong_reward_model_is_not_exported(fault, judge, monkeypatch):
    break_live(monkeypatch, fault)
    with pytest.raises(RunError, match=r"scores up to .* otherwise than the live one"):
        Export(judge, ExportOptions()).make()


def test_a_broken_adapter_file_is_not_exported_as_another_model(run, monkeypatch):
    from lowmem_rlhf.export.formats import adapter_files as module

    copied = module.shutil.copyfile

    def broken(source, target):
        copied(source, target)
        if str(target).endswith("adapter_model.safetensors"):
            tensors = load_file(target)
            name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.lora_B.weight"))
            save_file(tensors | {name: -tensors[name]}, target, metadata={"format": "pt"})

    monkeypatch.setattr(module.shutil, "copyfile", broken)
    with pytest.raises(RunError, match=WRONG_LIVE):
        Export(run, ExportOptions(format="adapter")).make()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"])
def test_the_errors_of_storage_are_as_large_as_real_ones(kind):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 512, generator=generator) * torch.logspace(-3, 1, 16)[:, None]
    how = stored_kind(kind, 512, False)
    off = furthest_row(as_stored(weight, how, generator), weight, how)
    assert 0.2 < off < 0.5  # a rounding error is evenly spread: 1 / sqrt(12) of a step
    assert furthest_row(weight.roll(1, 0), weight, how) > 1.0
    assert furthest_row(weight, weight, how) == 0.0
    assert stored_kind("q8_0", 100, False) == "float16" and stored_kind("q4_k_m", 96, False) == "q5_0"
