"""The catalogue's families against stock transformers in architectures.py's quick form, and what makes its rows."""

import json

import architecture_checks
import architecture_rows
import architectures
import pytest
import torch
from architecture_table import BAD, page
from architecture_workers import rows_by_process
from pretended_rows import pretend
from tiny_architectures import TOKENS, model_types, save_tiny, tiny, tiny_config

from lowmem_rlhf.architecture.families import types_with_terms


@pytest.mark.parametrize("name", types_with_terms())
def test_no_family_of_the_catalogue_is_wrong(name):
    row = architecture_rows.row_of(name, quick=True)
    assert row["verdict"] == "packed", row
    assert row["fp32"]["adapter_effect"] > 0.05 and {"logps", "gradients", "sampled"} <= row["fp32"].keys()
    assert {"logps", "sampled", "noise"} <= row["bf16"].keys()


@pytest.mark.parametrize("broken", ["forgotten", "doubled"])
def test_a_factor_of_the_logits_that_is_wrong_is_seen(broken, monkeypatch):
    from lowmem_rlhf.engine.logprobs import Head

    power = {"forgotten": 0, "doubled": 2}[broken]
    monkeypatch.setattr(Head, "_finished", lambda head, logits: logits.mul_(head.scale**power))
    row = architecture_rows.row_of("granite", quick=True)
    assert row["verdict"] in ("wrong", "refused")


def test_a_sampled_log_prob_that_is_off_is_seen(monkeypatch):
    def shifted(base, groups, dequantize=False):
        drawn, logps = sampled(base, groups, dequantize)
        return drawn, {row: values + 0.01 for row, values in logps.items()}

    sampled = architecture_checks.sampled
    monkeypatch.setattr(architecture_checks, "sampled", shifted)
    row = architecture_rows.row_of("llama", quick=True)
    assert (row["verdict"], row["why"]) == ("wrong", "fp32: sampled")


def test_every_type_has_a_configuration_that_is_small():
    for name in model_types():
        config = tiny_config(name)
        config = getattr(config, "text_config", None) or config
        assert getattr(config, "hidden_size", 64) == 64, name
        assert getattr(config, "vocab_size", 320) == 320, name


def test_weights_are_those_of_a_seed_and_of_a_checkpoint_and_not_near_their_start(tmp_path):
    model, again, other = tiny("gemma3_text"), tiny("gemma3_text"), tiny("gemma3_text", seed=1)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name)) and torch.equal(p, p.bfloat16().float())
        assert not torch.equal(p, other.get_parameter(name))
    norms = torch.cat([p for name, p in model.named_parameters() if "norm" in name])
    assert norms.max() > 20 and norms.min() < -0.5 and (norms == 0).any()
    assert all(p.std() > 0.1 for name, p in tiny("phi").named_parameters() if name.endswith(".bias"))
    ids = torch.randint(4, TOKENS, (2, 20), generator=torch.Generator().manual_seed(1))
    assert 1 < model(input_ids=ids).logits.std() < 4
    assert {"config.json", "tokenizer.json"} <= {path.name for path in save_tiny("llama", tmp_path / "m").iterdir()}


def test_another_expert_for_a_token_is_no_error_and_a_shift_of_all_tokens_is():
    part = {"noise": [0.01, 0.01], "logps": [0.2, 0.02], "experts": True}
    assert architecture_checks.off(part) == []
    assert architecture_checks.off({**part, "experts": False}) == ["logps"]
    assert architecture_checks.off({**part, "logps": [0.2, 0.05]}) == ["logps"]
    assert architecture_checks.off({"logps": 1e-5, "gradients": float("nan"), "sampled": 0.1}) == [
        "gradients",
        "sampled",
    ]


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ({"fp32": {"way": "padded", "note": "why", "logps": 1e-6}}, "padded"),
        ({"fp32": {"way": "packed", "note": "", "logps": 1e-2}}, "wrong"),
        ({"fp32": {"way": "packed", "note": ""}, "merge": {"logps": 0.1}}, "wrong"),
        ({"fp32": {"way": "packed", "note": ""}, "gguf": {"verdict": "refused", "why": "no"}}, "packed"),
        ({"fp32": {"way": "packed", "note": ""}, "sft": {"verdict": "traceback", "why": "x"}}, "traceback"),
        ({"fp32": {"way": "packed", "note": "", "logps": 1.0}, "plan": {"verdict": "refused", "why": "no"}}, "refused"),
        ({"fp32": {"verdict": "refused", "why": "no"}, "plan": {"verdict": "traceback", "why": "x"}}, "traceback"),
        ({"fp32": {"verdict": "refused", "why": "no"}}, "refused"),
        ({"fp32": {"verdict": "stock_fails", "why": "x"}}, "stock_fails"),
    ],
)
def test_a_verdict_follows_from_the_parts(parts, verdict):
    assert architecture_rows.judged({"type": "x", **parts})["verdict"] == verdict


def test_a_process_that_crashes_or_hangs_costs_one_row():
    rows = {row["type"]: row for row in rows_by_process(["crashes", "fine"], 2, 600, pretend, ())}
    assert rows["fine"] == {"type": "fine", "verdict": "packed"}
    assert rows["crashes"]["verdict"] == "traceback" and "code 7 at fp32" in rows["crashes"]["why"]
    (row,) = rows_by_process(["hangs"], 1, 0.5, pretend, ())
    assert row["verdict"] in (*BAD, "not_built") and "still at" in row["why"]


def test_rows_of_other_code_are_made_anew(tmp_path):
    rows = [{"type": "llama", "code": "a"}, {"type": "phi", "code": "b"}, {"type": "llama", "code": "b", "new": True}]
    file = tmp_path / "state.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert architectures.kept_rows(file, "b") == {"llama": rows[2], "phi": rows[1]}
    assert architectures.kept_rows(tmp_path / "absent", "b") == {}


def test_the_page_names_every_type_by_verdict_and_no_folder():
    refused = {"type": "b|c", "verdict": "refused", "why": "model '/tmp/tmpx1/tiny' is no model"}
    fine = {
        "type": "llama",
        "verdict": "packed",
        "why": "",
        "fp32": {"logps": 2e-6, "sampled": 3e-6, "gradients": 1e-7, "targets": ["q"]},
        "bf16": {"noise": [0.01, 0.01], "logps": [0.012, 0.01]},
        "plan": {"says": "yes", "parameters": 0.998},
        "gguf": {"verdict": "refused", "why": "no GGUF of it"},
    }
    text = page([fine, refused])
    assert "## Packed (1)" in text and "## Refused (1)" in text and "/tmp" not in text
    assert "| llama\\* | 2e-06 | 3e-06 | 1e-07 | 1.2 | - | yes, 1.00 | - | - | - | - |" in text
    assert "- llama: gguf: no GGUF of it" in text and "model 'MODEL' is no model" in text
