"""The catalogue against published counts and transformers' own classes, and in which order a Hub id is looked up."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning_cases import CONFIGS

from lowmem_rlhf.architecture import counting, hub
from lowmem_rlhf.architecture.catalogue import FILE, catalogue, entries, find, series, smaller_than
from lowmem_rlhf.architecture.count_class import count_class
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import load_recipe

MEASURED = Path(__file__).resolve().parents[3] / "shared" / "data" / "vram" / "t4_measured.csv"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""
    import huggingface_hub

    def offline() -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "get_session", offline)
    return tmp_path


def put(cache: Path, model: str, config: dict[str, Any], ref: str = "main") -> Path:
    """Lay a config into the cache as a download would."""
    folder = cache / f"models--{model.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for path, text in ((snapshot / "config.json", json.dumps(config)), (folder / "refs" / ref, COMMIT)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return snapshot / "config.json"


def test_the_file_is_whole():
    """Every name once, every entry with its sources, and the models that the recipes start from among them."""
    content = json.loads(FILE.read_text())
    names = [name for model in content["models"] for name in (*model["names"], *model.get("variants", {}))]
    assert len(content["models"]) >= 30
    assert len({name.casefold() for name in names}) == len(names) == len(entries())
    for model in content["models"]:
        assert model["checked"] and set(model["checked"]) <= content["sources"].keys(), model["names"][0]
        assert all(
            set(changes) <= {*model["config"], "sliding_window"} for changes in model.get("variants", {}).values()
        )
    for recipe in (
        "grpo_gsm8k",
        "grpo_llama32_gsm8k",
        "grpo_qwen35_gsm8k",
        "grpo_gemma_gsm8k",
        "sft_chat",
        "sft_gpt2_gsm8k",
        "sft_qwen_gsm8k",
    ):
        assert find(load_recipe(recipe, []).model)


@pytest.mark.parametrize("name", list(entries()))
def test_the_count_is_the_published_one(name):
    dims = find(name)
    assert dims.num_parameters == entries()[name].parameters
    assert bool(dims.note) is not dims.known


@pytest.mark.parametrize("name", list(catalogue()))
def test_the_count_is_that_of_the_transformers_class(name):
    """Built without memory (on the meta device) from the very fields that the catalogue has."""
    import torch
    import transformers

    config, counted = dict(entries()[name].config), entries()[name].counted
    if counted:
        assert counting._counted(count_class(config)) == counted
        assert find(name).num_parameters == counted.total
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        )
    dims, blocks = find(name), [p for n, p in model.named_parameters() if ".layers." in n or ".h." in n]
    assert dims.num_parameters == sum(p.numel() for p in model.parameters())
    assert dims.linear_parameters == sum(p.numel() for p in blocks if p.dim() == 2)
    assert dims.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.skipif(not MEASURED.is_file(), reason=f"the measured runs are not in {MEASURED.parent}")
def test_the_sizes_are_those_of_the_measured_models():
    with MEASURED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in {row["model"]: row for row in rows}.values():
        dims = find(row["model"])
        found = (dims.vocab_size, dims.hidden_size, dims.num_layers, dims.intermediate_size, dims.num_parameters)
        assert found == tuple(int(row[key]) for key in ("vocab", "hidden", "layers", "inter", "params"))
        assert dims.tied == (row["tied"] == "True")


def test_what_differs_between_the_names_of_a_model():
    assert find("qwen/qwen2.5-1.5b-INSTRUCT") == find("Qwen/Qwen2.5-1.5B-Instruct")
    assert find("Qwen/Qwen2.5-1.5B-Instruct").max_positions == 32768
    assert find("Qwen/Qwen2.5-1.5B").max_positions == 131072
    assert (find("mistralai/Mistral-7B-v0.1").sliding_window, find("mistralai/Mistral-7B-v0.3").sliding_window) == (
        4096,
        None,
    )
    assert (find("google/gemma-2-2b").sliding_layers, find("google/gemma-3-1b-it").sliding_layers) == (13, 22)
    assert (find("google/gemma-2-2b").torch_dtype, find("google/gemma-2-2b-it").torch_dtype) == ("float32", "bfloat16")
    assert find("Qwen/Qwen2.5-0.5B").head_dim == 64 and find("Qwen/Qwen3-0.6B").head_dim == 128
    assert (find("microsoft/phi-2").rotary_dim, find("gpt2").rotary_dim) == (32, 0)
    assert find("nobody/nothing") is None


def test_smaller_models_come_from_the_same_series_first():
    names = [name for name, _ in smaller_than(find("Qwen/Qwen2.5-7B"))]
    assert names[:3] == [f"Qwen/Qwen2.5-{size}-Instruct" for size in ("3B", "1.5B", "0.5B")]
    assert [dims.num_parameters for _, dims in smaller_than(find("Qwen/Qwen2.5-7B"))[3:]] == sorted(
        (d.num_parameters for n, d in catalogue().items() if d.num_parameters < 7_615_616_512 and "Qwen2.5" not in n),
        reverse=True,
    )
    assert "Qwen/Qwen2.5-7B-Instruct" not in names
    assert smaller_than(find("distilgpt2")) == []
    # a fine-tune with sizes of its own: the series of its type
    own = dimensions_from_config({**entries()["Qwen/Qwen3-8B"].config, "num_hidden_layers": 20}, "mine")
    assert smaller_than(own)[0][0] == "Qwen/Qwen3-4B"
    assert {name.split("/")[0] for name, _ in smaller_than(own)[:3]} == {"Qwen"}


def test_the_catalogue_answers_without_cache_and_network(cache):
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "gpt2"):
        assert model_dimensions(name) == find(name)
    assert model_dimensions("Qwen/Qwen2.5-0.5B").note == ""


def test_the_cache_comes_before_the_catalogue(cache):
    config = {**CONFIGS["Qwen2.5-0.5B"], "num_hidden_layers": 3}
    put(cache, "Qwen/Qwen2.5-0.5B", config)
    assert model_dimensions("Qwen/Qwen2.5-0.5B").num_layers == 3
    put(cache, "org/other", config)
    assert model_dimensions("org/other").num_layers == 3


def test_a_revision_is_not_the_catalogues(cache):
    """From the cache by tag and by commit; offline, the catalogue's sizes with a note."""
    name = "Qwen/Qwen2.5-0.5B"
    noted = model_dimensions(name, "v2")
    assert noted == find(name) and "not of revision v2" in noted.note
    put(cache, name, {**CONFIGS["Qwen2.5-0.5B"], "num_hidden_layers": 3}, ref="v2")
    assert model_dimensions(name, "v2").num_layers == model_dimensions(name, COMMIT).num_layers == 3
    assert model_dimensions(name).num_layers == 24


def test_the_cache_is_read_as_huggingface_hub_reads_it(cache):
    from huggingface_hub import try_to_load_from_cache

    path = put(cache, "org/name", CONFIGS["gpt2"])
    for revision in (None, "main", COMMIT, "v3", COMMIT[::-1]):
        theirs = try_to_load_from_cache("org/name", "config.json", cache_dir=cache, revision=revision)
        assert hub.cached_config("org/name", revision) == (None if theirs is None else Path(theirs))
    assert hub.cached_config("org/name") == path
    assert hub.cached_config("gpt2") is None


def test_a_model_that_cannot_be_reached_names_one_that_can(cache):
    with pytest.raises(UserError, match=r"cannot be reached.*did you mean 'Qwen/Qwen2.5-3B-Instruct'"):
        model_dimensions("Qwen/Qwen2.5-3B-Instrukt")
    with pytest.raises(UserError, match=r"model=LOCAL_FOLDER; no network is needed for Qwen2.5, .*GPT-2"):
        model_dimensions("zzz/0")
    with pytest.raises(UserError, match="is no Hub id"):
        model_dimensions("org/a..b")
    assert series()[0] == "Qwen2.5"


def test_a_plan_of_a_known_model_imports_next_to_nothing(tmp_path):
    """Neither torch and its kin, nor the Hub's downloading code and its HTTP library."""
    code = """
import json, sys
from typer.testing import CliRunner
from lowmem_rlhf.cli import app
result = CliRunner().invoke(app, ["plan", "grpo_gsm8k", "--profile", "rtx-2080-ti", "--json"])
json.loads(result.stdout)
heavy = ("torch", "transformers", "peft", "numpy", "datasets", "huggingface_hub.file_download", "httpx", "httpx2")
print([name for name in heavy if name in sys.modules])
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip() == "[]"


def test_sizes_are_equal_whatever_the_note():
    dims = find("gpt2")
    assert replace(dims, note="from elsewhere") == dims
