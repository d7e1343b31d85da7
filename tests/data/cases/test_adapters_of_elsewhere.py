"""Adapters that were made elsewhere, folders given for what they are not, and stages whose first stage is missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.architecture.fingerprint import fingerprint
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.architecture.source import resolve_model
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.loading import load_recipe, shipped_recipes
from lowmem_rlhf.rewards.loading import load_rewards
from lowmem_rlhf.run.base_file import Fingerprint, read_base, write_base
from lowmem_rlhf.run.directory import default_output


@pytest.fixture
def model(tiny_folder, tmp_path, monkeypatch):
    """Return the folder one/final with a model; the folder above is the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "one/final")
    return "one/final"


def stock_adapter(model, folder, base=None, **settings):
    """Write an adapter as peft does, of a model in a folder; return its folder."""
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **settings})
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return configure(folder, base_model_name_or_path=base or model)


def configure(folder, **changes):
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return str(folder)


def changed_copy(model, folder, change=lambda tensor: tensor + 0.02 * torch.randn_like(tensor)):
    torch.manual_seed(1)
    shutil.copytree(model, folder)
    file = Path(folder) / "model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def refused(work, *arguments):
    with pytest.raises(UserError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The content of a model


def test_a_copy_is_the_same_however_it_is_cut_and_saved(model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained("again", max_shard_size="100KB")
    assert len(list(Path("again").glob("*.safetensors"))) > 2
    assert fingerprint("again").weights == fingerprint(model).weights
    assert fingerprint("again").config == fingerprint(model).config
    assert fingerprint(model).differing(fingerprint("again")) == []


@pytest.mark.parametrize("part", ["embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "model.norm"])
def test_training_of_any_part_is_seen(model, part):
    file = Path(changed_copy(model, "two", lambda tensor: tensor)) / "model.safetensors"
    assert fingerprint("two") == fingerprint(model)
    tensors = load_file(file)
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, file)
    assert fingerprint("two").differing(fingerprint(model)) == ["weights"]


def test_large_tensors_are_read_in_places(tmp_path):
    tensors = {f"layer.{n}": torch.randint(0, 99, (1024, 1024), dtype=torch.int64) for n in range(3)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(tensors, tmp_path / name / "model.safetensors")
        tensors["layer.1"] = tensors["layer.1"] + 1
    a, b = (fingerprint(str(tmp_path / name)) for name in ("a", "b"))
    assert isinstance(a, Fingerprint) and a.differing(b) == ["weights"]


def test_a_gguf_is_told_by_its_bytes(tmp_path):
    data = bytearray(b"GGUF" + bytes(range(256)) * 30_000)
    for name, place in (("a", 0), ("b", 0), ("middle", len(data) // 2), ("end", len(data) - 1)):
        data[place] ^= place > 0
        (tmp_path / f"{name}.gguf").write_bytes(data)
    told = {name: fingerprint(str(tmp_path / f"{name}.gguf")) for name in ("a", "b", "middle", "end")}
    assert told["a"] == told["b"] and told["a"].kind == "gguf"
    assert told["a"] != told["end"] != told["middle"]


@pytest.mark.parametrize("broken", [b"", b"\0" * 4, b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_model_has_no_fingerprint(model, broken):
    (Path(model) / "model.safetensors").write_bytes(broken)
    assert fingerprint(model) is None
    assert fingerprint("nowhere/at/all") is None and fingerprint("org/not-in-the-cache") is None


# An adapter and its base


def test_an_adapter_of_another_base_with_the_same_last_name_is_refused(model):
    changed_copy(model, "two/final")
    adapter = stock_adapter(model, "adapter")
    message = refused(saved_adapter, adapter, "./two/final")
    assert "was trained on other weights than the recipe's model has: on 'one/final'" in message
    assert "'./two/final' has" in message and message.endswith("give model=one/final")
    assert saved_adapter(adapter, "./one/final").shape.r == 2


def test_the_fingerprint_beside_an_adapter_outlives_its_base(model, caplog):
    adapter = stock_adapter(model, "adapter")
    write_base(Path("adapter"), {"model": str(Path(model).resolve()), **fingerprint(model).to_dict()})
    assert read_base(Path("adapter"))[0] == "final"  # without a folder of this machine
    shutil.copytree(model, "copied/under/another-name")
    changed_copy(model, "two/final")
    shutil.rmtree("one")
    assert saved_adapter(adapter, "copied/under/another-name").base == model
    assert "trained on other weights" in refused(saved_adapter, adapter, "two/final")
    assert not caplog.text


def test_a_copy_on_the_hub_and_a_local_one_are_the_same_base(model, tmp_path, monkeypatch, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, commit, source in (("same", "a" * 40, model), ("other", "b" * 40, changed_copy(model, "two/final"))):
        folder = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(source, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    assert fingerprint("org/same").commit == "a" * 40 and fingerprint("org/same").differing(fingerprint(model)) == []
    local, of_hub = stock_adapter(model, "local"), stock_adapter(model, "hub-adapter", base="org/same")
    assert saved_adapter(local, "org/same").base == model and saved_adapter(of_hub, model).base == "org/same"
    assert "trained on other weights" in refused(saved_adapter, local, "org/other")
    assert not caplog.text


def test_where_only_the_names_agree_that_is_said_once(model, caplog):
    adapter = stock_adapter(model, "adapter", base="/somewhere/else/final")
    for _ in range(2):
        saved_adapter(adapter, model)
    assert caplog.text.count("only the names agree") == 1
    assert "belongs to '/somewhere/else/other'" in refused(
        saved_adapter, configure(adapter, base_model_name_or_path="/somewhere/else/other"), model
    )


QUANTIZED = ["{}-bnb-4bit", "{}-unsloth-bnb-4bit", "{}-bnb-8bit", "{}-GPTQ-Int4", "{}-AWQ", "{}-4bit", "{}-FP8"]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_copy_stands_for_its_16_bit_model(model, name, caplog):
    base = "someone/" + name.format("Final")
    adapter = stock_adapter(model, f"adapter-{name[2:]}", base=base)
    assert saved_adapter(adapter, model).base == base
    assert f"was trained on {base}, a quantized copy of someone/Final; it is put on one/final" in caplog.text
    message = refused(saved_adapter, adapter, "org/Another")
    assert "model=someone/Final)" in message and f"model={base}" not in message


@pytest.mark.parametrize("name", ["org/Model-4b", "org/Model-8B-Instruct", "org/fp8-study", "org/my.gguf.notes"])
def test_names_that_only_look_quantized_are_names(model, name):
    adapter = stock_adapter(model, "adapter", base=name)
    assert refused(saved_adapter, adapter, model).count(f"give model={name},") == 1


KINDS = {
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "is beside embed_tokens too"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "is beside lm_head too; here only linear layers inside"),
    "whole weights": ({"modules_to_save": ["lm_head"]}, "has modules_to_save, whole weights that were trained"),
    "dora": ({"use_dora": True}, "has use_dora, which scales each row of a whole weight to a length"),
    "new tokens": ({"trainable_token_indices": [3]}, "has trainable_token_indices, more than a low-rank product"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_more_or_less_says_what(model, kind):
    settings, said = KINDS[kind]
    assert said in refused(saved_adapter, stock_adapter(model, "adapter", **settings), model)


BY_HAND = {
    "r": (None, 0, -1, "16", 1.5, True),
    "lora_alpha": (None, 0, -2, "16", True, float("nan"), float("inf"), [1]),
    "peft_type": (None, 3, "IA3"),
    "bias": (3, ["none"]),
    "layers_to_transform": (["a"], -1),
    "target_modules": (3, ["q_proj", None], {"q_proj": 1}, "proj("),
    "exclude_modules": (3, [None]),
    "rank_pattern": ({"q_proj": 8}, {"(": 1}, [1], "q_proj"),
    "alpha_pattern": ({"q_proj": 0}, {"(": 1}, 3),
    "use_dora": (True,),
    "modules_to_save": (["lm_head"],),
    "base_model_name_or_path": (3,),
}


def test_a_configuration_that_peft_did_not_write_is_one_sentence(model):
    adapter = stock_adapter(model, "adapter")
    file = Path(adapter) / "adapter_config.json"
    right = file.read_text()
    for key, values in BY_HAND.items():
        for value in values:
            file.write_text(right)
            assert key in refused(saved_adapter, configure(adapter, **{key: value}), model) or key == "peft_type"
    for key in ("r", "lora_alpha", "peft_type"):
        file.write_text(json.dumps({name: value for name, value in json.loads(right).items() if name != key}))
        assert repr(adapter) in refused(saved_adapter, adapter, model)
    for text in ("", "[]", "3", "null", '{"r"'):
        file.write_text(text)
        assert repr(adapter) in refused(saved_adapter, adapter, model)
    file.write_text(right)
    assert saved_adapter(configure(adapter, use_rslora=True), model).shape.use_rslora


def test_weights_that_do_not_belong_to_the_configuration_are_named(model):
    adapter = stock_adapter(model, "adapter")
    assert "says r=4, and base_model" in refused(saved_adapter, configure(adapter, r=4), model)
    configure(adapter, r=2)
    file = Path(adapter) / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    assert "is of I8, and not of floating-point numbers" in refused(saved_adapter, adapter, model)
    save_file({"score.weight": torch.ones(1, 64)}, file)
    assert "holds no matrix of an adapter" in refused(saved_adapter, adapter, model)
    for cut in (whole[:-1], whole[:50], b"", b"version https://git-lfs.github.com/spec/v1"):
        file.write_bytes(cut)
        assert "adapter_model.safetensors cannot be read" in refused(saved_adapter, adapter, model)
    file.write_bytes(whole)
    (Path(adapter) / "head.safetensors").write_bytes(whole[:60])
    assert "head.safetensors cannot be read" in refused(saved_adapter, adapter, model)


def test_all_layers_by_their_numbers_are_all_layers(model):
    assert saved_adapter(stock_adapter(model, "adapter", layers_to_transform=[0, 1]), model).shape.r == 2


def test_repeated_layers_are_refused(model):
    adapter = configure(stock_adapter(model, "adapter"), layer_replication=[[0, 2], [1, 2]])
    assert "layer_replication is not supported" in refused(saved_adapter, adapter, model)


# Folders given for what they are not


def test_an_adapters_folder_is_no_model(model):
    adapter = stock_adapter(model, "adapter", base="unsloth/final-bnb-4bit")
    said = "is an adapter's folder, not a model; give its base and the adapter: model=unsloth/final adapter=adapter"
    assert said in refused(resolve_model, "./adapter")
    assert said in refused(model_dimensions, adapter)  # so a plan says it too
    shutil.copy(Path(model) / "config.json", adapter)  # transformers would load the base that it names
    assert said in refused(resolve_model, adapter)


def test_a_runs_folder_is_no_model(model):
    run = Path("runs/mine")
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"name: mine\nalgorithm: sft\nmodel: {model}\n")
    assert "is a run that is not finished; let it finish first" in refused(resolve_model, "runs/mine")
    stock_adapter(model, run / "adapter")
    said = "is a run, not a model; export it (lowmem-rlhf export runs/mine) and give model=runs/mine/export/merged"
    assert f"{said}, or go on from its adapter: model=one/final adapter=runs/mine" in refused(resolve_model, str(run))
    shutil.copytree(model, run / "export" / "merged")
    assert "take its export, model=runs/mine/export/merged" in refused(resolve_model, str(run))
    assert resolve_model("runs/mine/export/merged")
    shutil.copytree(run / "adapter", run / "checkpoints" / "step-3")
    assert "adapter=runs/mine/checkpoints/step-3" in refused(resolve_model, "runs/mine/checkpoints/step-3")
    assert "it holds adapters" in refused(resolve_model, "./runs/mine/checkpoints")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "it holds a tokenizer alone"),
        (["config.json", "pytorch_model.bin"], "holds its weights as pytorch_model.bin, which can only be read by"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "holds its weights as pytorch_model-00001"),
        (["model.safetensors"], "it holds weights: copy the model's config.json"),
        (["adapter_model.safetensors"], "it holds an adapter's weights, but not their adapter_config.json"),
        (["checkpoint-9/config.json"], "did you mean model=given/checkpoint-9?"),
        (["snapshots/abc/config.json"], "did you mean model=given/snapshots/abc?"),
        (["notes.txt"], "is a folder without config.json, so it holds no transformers model"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path, monkeypatch, files, said):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path("given", name).parent.mkdir(parents=True, exist_ok=True)
        Path("given", name).write_text("{}")
    assert said in refused(resolve_model, "given")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["adapter_model.safetensors"], "without its adapter_config.json, which says how the weights are scaled"),
        (["adapter_config.json", "adapter_model.bin"], "holds adapter_model.bin, which can only be read by unpickling"),
        (["adapter_config.json"], "holds adapter_config.json without its adapter_model.safetensors"),
        (["config.json", "model.safetensors"], "is a whole model, not an adapter; give it as the model (model=given)"),
        (["policy/adapter_config.json", "policy/adapter_model.safetensors"], "did you mean adapter=given/policy?"),
    ],
)
def test_a_folder_that_is_no_adapter_says_what_it_is(tmp_path, monkeypatch, files, said):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path("given", name).parent.mkdir(parents=True, exist_ok=True)
        Path("given", name).write_text("{}")
    assert said in refused(saved_adapter, "given", "org/model")
    assert "is a file; give the folder that it lies in" in refused(saved_adapter, f"given/{files[0]}", "org/model")


# A stage whose first stage is missing


def first_stages():
    """Return (first recipe, what asks for it) of every shipped recipe that begins with another's run."""
    found = []
    for name in shipped_recipes():
        recipe = load_recipe(name)
        if recipe.adapter:
            found.append((recipe.adapter, lambda recipe=recipe: saved_adapter(recipe.adapter, recipe.model)))
        for reward in recipe.rewards:
            for path in [
                path for key in ("model", "adapter") if (path := reward.options.get(key, "")).startswith("runs/")
            ]:
                found.append((path, lambda recipe=recipe: load_rewards(recipe.rewards, model=recipe.model)))
    return found


def test_a_stage_whose_first_stage_is_missing_names_the_recipe_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stages = first_stages()
    assert len(stages) >= 5
    for path, ask in stages:
        name = path.split("/")[1]
        assert default_output(load_recipe(name).name) == Path("runs") / name
        assert f"does not exist; run the recipe {name} first: lowmem-rlhf train {name}" in refused(ask)


def test_a_first_stage_that_is_not_finished_is_named_with_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sft_gpt2_gsm8k", "style_classifier"):
        run = Path("runs") / name
        run.mkdir(parents=True)
        (run / "recipe.yaml").write_text(load_recipe(name).to_yaml())
    message = refused(saved_adapter, "runs/sft_gpt2_gsm8k", "openai-community/gpt2")
    assert "let it finish first: lowmem-rlhf train sft_gpt2_gsm8k --output runs/sft_gpt2_gsm8k --resume" in message
    message = refused(lambda: load_rewards(load_recipe("style_grpo").rewards))
    assert "a classifier's run cannot be continued, start it anew: lowmem-rlhf train style_classifier" in message


def test_a_run_of_no_shipped_recipe_is_only_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/mine").mkdir(parents=True)
    assert "did you mean" in refused(saved_adapter, "runs/mina", "org/model")
    assert "is no folder here, and the Hugging Face Hub cannot be" in refused(saved_adapter, "org/lora", "org/model")
    assert "--output elsewhere/runs/sft_gpt2_gsm8k" in refused(
        saved_adapter, "elsewhere/runs/sft_gpt2_gsm8k", "openai-community/gpt2"
    )
