"""Whole exports of tiny runs: what is written, how it loads elsewhere, and what its proof says."""

import json
from pathlib import Path

import pytest
import torch
from export_cases import CPU, SAMPLES, change_tensors, make_run, save_model, size_adapter
from peft import PeftModel
from safetensors.torch import load_file
from tiny_runs import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lowmem_rlhf import cli
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.engine.roles import CRITIC, POLICY
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.export import Export
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.export.proof.compare import Bound, compare
from lowmem_rlhf.export.proof.outputs import in_float32, policy_outputs
from lowmem_rlhf.export.proof.stock import stock_logits
from lowmem_rlhf.export.proof.verify import placement, stock_model
from lowmem_rlhf.inference.open_run import OpenRun


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny Llama's folder; its weights lie on bfloat16's numbers, as most checkpoints' do."""
    folder = save_model("llama", tmp_path_factory.mktemp("model") / "llama")
    change_tensors(folder, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    return folder


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("plain") / "run", model, 0.05)


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("nf4") / "run", model, 0.01, "nf4", "bfloat16")


def export(run, **options):
    return Export(run, ExportOptions(**options)).make()


def test_the_merged_folder_is_the_live_policy_in_stock_transformers(plain, tmp_path):
    facts = export(plain, output=tmp_path / "out", dtype="float32")
    live = policy_outputs(OpenRun(plain), None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    for ids, want in zip(live.ids, live.logits.policy, strict=True):
        with torch.no_grad():
            got = loaded(torch.tensor([ids])).logits[0, :-1]
        assert torch.allclose(got, want, atol=1e-3, rtol=1e-4)
    proof = facts["proof"]
    assert proof["compared_on"] == "samples of the run" and proof["tokens"] > 50
    assert proof["mean_kl"] < 1e-6 and proof["top1_agreement"] == 1.0
    assert proof["kept_in_predictions"] == pytest.approx(1, abs=1e-3) and proof["kept_share"] == pytest.approx(1)
    assert proof["kl_of_live_policy_to_its_base"] > 1e-3
    assert json.loads((tmp_path / "out" / "export.json").read_text())["proof"] == proof
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Proof of the export" in card and str(tmp_path) not in card
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("3+4")["input_ids"]
        == load_base(str(plain.recipe_values()["model"]), "none", "float32", CPU)[1]("3+4")["input_ids"]
    )


def test_float16_is_the_default_and_stands_in_the_run(plain):
    facts = export(plain)
    assert facts["dtype"] == "float16" and "survives" in facts["dtype_reason"]
    assert facts["folder"] == str(plain.path / "export" / "merged")
    assert facts["proof"]["mean_kl"] < 1e-5
    assert not [path for path in (plain.path / "export").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("precision", [("nf4", "bfloat16"), ("nf4", "float16"), ("int8", "float16")])
def test_onto_quantized_is_the_policy_and_onto_original_its_adapter_on_16_bits(model, precision, tmp_path):
    run = make_run(tmp_path / "run", model, 0.05, *precision)
    faithful, original = export(run), export(run, onto="original", output=tmp_path / "original")
    assert (faithful["onto"], original["onto"]) == ("quantized", "original")
    proof = faithful["proof"]
    assert proof["mean_kl"] < 1e-5 and proof["top1_agreement"] > 0.98
    assert proof["kept_in_predictions"] == pytest.approx(1, abs=0.01)
    assert proof["mean_kl"] < proof[f"mean_kl_with_{precision[1]}_arithmetic"] < 0.05
    other = original["proof"]
    assert other["mean_kl"] > 10 * proof["mean_kl"]  # the base's quantization
    assert other["mean_kl_to_adapter_on_original"] < 1e-5
    assert other["kept_in_predictions"] == pytest.approx(1, abs=0.01)


def test_peft_s_merge_into_nf4_does_not_pass_the_same_check(quantized, model):
    live = policy_outputs(OpenRun(quantized), None)
    base, _ = load_base(str(model), "nf4", "bfloat16", CPU)
    merged = PeftModel.from_pretrained(base, str(quantized.path / "adapter")).merge_and_unload()
    assert live.exact_logits and in_float32(merged, torch.bfloat16, CPU)
    found = compare(live.exact_logits.policy, live.exact_logits.base, stock_logits(merged.eval(), live.ids))
    with pytest.raises(RunError, match="has lost what training changed"):
        found.check("peft's merge", "the live policy", Bound(10.0, 0.0))


def test_the_adapter_loads_in_stock_peft(plain, tmp_path):
    facts = export(plain, format="adapter", output=tmp_path / "out")
    live = policy_outputs(OpenRun(plain), None)
    stock = AutoModelForCausalLM.from_pretrained(plain.recipe_values()["model"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(stock, str(tmp_path / "out")).eval()
    for got, want in zip(stock_logits(loaded, live.ids), live.logits.policy, strict=True):
        assert torch.allclose(got, want, atol=1e-3, rtol=1e-4)
    assert facts["proof"]["mean_kl"] < 1e-6 and "dtype" not in facts
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_adapter_on_a_quantized_base_is_compared_in_its_precision(quantized):
    proof = export(quantized, format="adapter")["proof"]
    assert proof["kept_in_predictions"] == pytest.approx(1, abs=0.05)


def test_bfloat16_is_refused_where_it_would_lose_the_change(model, tmp_path):
    small = make_run(tmp_path / "small", model, 4e-4)
    with pytest.raises(UserError, match=r"--dtype bfloat16 would keep [12345]\d% of what training changed"):
        export(small, dtype="bfloat16")
    assert not (small.path / "export" / "merged").exists()
    large = make_run(tmp_path / "large", model, 0.05)
    assert export(large, dtype="bfloat16")["proof"]["kept_share"] > 0.9


def test_a_change_too_small_for_float16_takes_float32_unless_told_otherwise(model, tmp_path):
    run = make_run(tmp_path / "run", model, 5e-5)
    facts = export(run)
    assert facts["dtype"] == "float32" and "float16 keeps only" in facts["dtype_reason"]
    tiny = make_run(tmp_path / "tiny", model, 1e-6)
    with pytest.raises(RunError, match="float16 keeps only"):
        export(tiny, dtype="float16")


def test_a_weight_too_large_for_float16_takes_float32(tmp_path):
    model = save_model("llama", tmp_path / "model")
    change_tensors(model, lambda t: t | {"model.norm.weight": torch.full((64,), 7e4)})
    run = make_run(tmp_path / "run", model, 0.05)
    facts = export(run)
    assert facts["dtype"] == "float32" and facts["dtype_reason"] == "model.norm.weight does not fit in float16"
    with pytest.raises(UserError, match=r"model\.norm\.weight holds a number that is too large for it"):
        export(run, dtype="float16")


def test_an_export_without_the_adapter_is_an_error_and_leaves_the_older_one(plain, monkeypatch):
    export(plain, format="merged")
    before = (plain.path / "export" / "merged" / "model.safetensors").read_bytes()
    factors = LoraFile.factors
    monkeypatch.setattr(LoraFile, "factors", lambda *args: tuple(0 * factor for factor in factors(*args)))
    with pytest.raises(RunError, match="has lost what training changed"):
        export(plain, format="merged")
    assert (plain.path / "export" / "merged" / "model.safetensors").read_bytes() == before
    assert [path.name for path in (plain.path / "export").iterdir()] == ["merged"]


def test_added_tokens_go_along(tmp_path):
    model = save_model("llama", tmp_path / "model", vocab_size=262)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{% for m in messages %}<think>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(model)
    run = make_run(tmp_path / "run", model, 0.05, samples=["<think>3+4</think>7", *SAMPLES])
    target = export(run)["folder"]
    again = AutoTokenizer.from_pretrained(target)
    assert again("<think>1</think>")["input_ids"] == tokenizer("<think>1</think>")["input_ids"]
    assert again.chat_template == tokenizer.chat_template and len(again) == 262
    files = [load_file(Path(folder) / "model.safetensors") for folder in (model, target)]
    before, after = (tensors["model.embed_tokens.weight"] for tensors in files)
    assert after.shape[0] == 262 and torch.equal(before.half(), after)


def test_a_reward_model_is_its_adapter_with_its_head(model, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": t, "chosen": t, "rejected": "no"} for t in SAMPLES * 2])
    data = {"train": str(pairs), "chosen": "chosen", "rejected": "rejected", "prompt": "prompt", "answer": None}
    changes = {"algorithm": "reward_model", "rewards": [], "data": data | {"template": None, "train_size": None}}
    base = SharedBase.load(str(model), CPU, "none", "float32", r=4, lora_alpha=8)
    base.add_head(POLICY, std=0.2)
    run = make_run(tmp_path / "run", model, 0.05, samples=[], base=base, **changes)
    facts = export(run)
    assert facts["format"] == "adapter" and facts["heads"] == ["head.safetensors"]
    assert facts["proof"]["largest_score_difference"] < 1e-3 < facts["proof"]["score_std"]
    with pytest.raises(UserError, match="trained a reward model"):
        export(run, format="merged")


def test_heads_of_a_critic_go_along_when_asked(model, plain, tmp_path):
    with pytest.raises(UserError, match=r"--heads: the run in .* trained no value or score head"):
        export(plain, heads=True)
    base = SharedBase.load(str(model), CPU, "none", "float32", r=4, lora_alpha=8)
    run = make_run(tmp_path / "run", model, 0.05, base=base, algorithm="ppo")
    base.add_role(CRITIC, 4, 8, "all-linear")
    base.add_head(CRITIC, bias=True)
    base.save_adapter(run.path / "adapter" / CRITIC, CRITIC)
    (run.path / "adapter" / "hashes.json").unlink()
    facts = export(run, heads=True)
    names = [f"critic/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "head.safetensors")]
    assert facts["heads"] == names and all((run.path / "export" / "merged" / name).is_file() for name in names)
    assert "heads" not in export(run)


def test_a_checkpoint_is_exported_by_its_step(plain, model, tmp_path):
    base = SharedBase.load(str(model), CPU, "none", "float32", r=4, lora_alpha=8)
    run = make_run(tmp_path / "run", model, 0.05, base=base)
    size_adapter(base, 0.2, seed=1)
    with run.new_checkpoint(7) as (folder, _):
        base.save_adapter(folder)
    facts = export(run, step=7)
    assert facts["step"] == 7 and facts["relative_change"] == pytest.approx(0.2, rel=0.01)
    with pytest.raises(UserError, match="--step 8"):
        export(run, step=8)


def test_a_model_with_no_room_is_read_from_the_disk(plain, tmp_path, monkeypatch):
    from lowmem_rlhf.export.proof import verify

    folder = export(plain, output=tmp_path / "out")["folder"]
    live = policy_outputs(OpenRun(plain), None)
    with stock_model(tmp_path / "out", CPU, False) as loaded:
        want = stock_logits(loaded, live.ids)
    monkeypatch.setattr(verify, "free_bytes", lambda device: 150_000)  # of 290 kB
    assert placement(tmp_path / "out", CPU, tmp_path)["device_map"] == "auto"
    with stock_model(tmp_path / "out", CPU, False) as loaded:
        assert "disk" in loaded.hf_device_map.values()
        for got, expected in zip(stock_logits(loaded, live.ids), want, strict=True):
            assert torch.allclose(got, expected, atol=0.05)
    assert folder == str(tmp_path / "out")


def test_the_command_prints_the_proof_and_json(plain, tmp_path):
    runner = CliRunner()
    done = runner.invoke(cli.app, ["export", str(plain.path), "--format", "adapter", "--output", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "mean kl" in done.stdout and f"export: {tmp_path / 'a'}" in done.stdout.replace("\n", "")
    done = runner.invoke(cli.app, ["export", str(plain.path), "--output", str(tmp_path / "b"), "--json"])
    assert json.loads(done.stdout)["proof"]["tokens"] > 50
    done = runner.invoke(cli.app, ["export", str(plain.path), "--dry-run"])
    assert "merging (host memory)" in done.stdout and "free: fits" in done.stdout
