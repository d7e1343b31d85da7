"""The export of a real model's first layers, SmolLM2-135M as NF4: merged equals live, from RL's changes to SFT's."""

import pytest
import torch
from export_cases import CPU, make_run
from model_folders import model_folder, truncated
from peft import PeftModel

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.export import Export
from lowmem_rlhf.export.options import ExportOptions
from lowmem_rlhf.export.proof.compare import Bound, compare
from lowmem_rlhf.export.proof.outputs import in_float32, policy_outputs
from lowmem_rlhf.export.proof.stock import stock_logits
from lowmem_rlhf.inference.open_run import OpenRun

TEXTS = [
    "Question: What is 12 + 30? Answer: First add the tens, 10 and 30, which gives 40, then add 2: 42.",
    "The robe takes 2 bolts of blue fiber and half that much white fiber, so it takes 3 bolts in total.",
    "Once upon a time there was a little girl who lived with her grandmother at the edge of a large, dark forest.",
]


@pytest.fixture(scope="module")
def model(smollm2, tmp_path_factory):
    return str(truncated(model_folder(smollm2), 8, tmp_path_factory.mktemp("smollm2") / "model"))


@pytest.fixture(scope="module")
def base(model):
    return SharedBase.load(model, CPU, "nf4", "bfloat16", r=4, lora_alpha=8)


@pytest.mark.parametrize("relative", [1e-4, pytest.param(1e-2, marks=pytest.mark.slow)])
def test_float16_onto_quantized_is_the_live_policy(base, model, tmp_path, relative):
    run = make_run(tmp_path / "run", model, relative, "nf4", "bfloat16", samples=TEXTS, base=base)
    facts = Export(run, ExportOptions(dtype="float16")).make()
    proof = facts["proof"]
    assert facts["relative_change"] == pytest.approx(relative, rel=0.05)
    assert proof["mean_kl"] < 1e-3 and proof["top1_agreement"] > 0.98 and proof["tokens"] > 60
    assert proof["kept_in_predictions"] > (0.95 if relative > 1e-3 else 0.3)


def test_peft_s_merge_into_nf4_fails_the_check_that_ours_passes(base, model, tmp_path):
    run = make_run(tmp_path / "run", model, 4e-3, "nf4", "bfloat16", samples=TEXTS, base=base)
    live = policy_outputs(OpenRun(run), None)
    stock, _ = load_base(model, "nf4", "bfloat16", CPU)
    merged = PeftModel.from_pretrained(stock, str(run.path / "adapter")).merge_and_unload().eval()
    assert live.exact_logits and in_float32(merged, torch.bfloat16, CPU)
    found = compare(live.exact_logits.policy, live.exact_logits.base, stock_logits(merged, live.ids))
    with pytest.raises(RunError, match="has lost what training changed"):
        found.check("peft's merge", "the live policy", Bound(10.0, 0.0))


def test_a_gguf_is_compared_as_well(base, model, tmp_path):
    run = make_run(tmp_path / "run", model, 1e-2, "nf4", "bfloat16", samples=TEXTS, base=base)
    facts = Export(run, ExportOptions(format="gguf", quantize="q8_0")).make()
    proof, folder = facts["proof"], run.path / "export" / "gguf"
    assert facts["onto"] == "original" and facts["file"] == "tiny-Q8_0.gguf"
    assert [path.name for path in folder.glob("*.gguf")] == [facts["file"]] and not list(folder.glob("*.tmp"))
    assert proof["mean_kl_to_adapter_on_original"] < 1e-3 < proof["mean_kl"]  # the base's quantization lies between
    assert proof["gguf_mean_kl"] == pytest.approx(proof["mean_kl"], rel=0.2)
