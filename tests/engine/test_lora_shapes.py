"""Adapters of every shape that peft has: rsLoRA, regular expressions, chosen layers, ranks and alphas by pattern.

What stock peft saves is loaded, computes the same, is counted by the plan, merged, and saved for stock peft again.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import CPU, EOS, VOCAB, fill_adapter, tiny_config, tiny_model, tiny_tokenizer

from lowmem_rlhf.architecture.adapters import saved_adapter
from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.lora import SharedLoraLinear
from lowmem_rlhf.engine.packing import Group
from lowmem_rlhf.engine.roles import CRITIC, INITIAL, POLICY, REFERENCE
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.formats.adapter_files import name_for
from lowmem_rlhf.export.merging.lora_file import LoraFile
from lowmem_rlhf.hardware.profiles import find_profile, profile_device
from lowmem_rlhf.planning.memory.resident import Memory, Settings
from lowmem_rlhf.recipe.loading import load_recipe
from lowmem_rlhf.recipe.lora_shape import LoraShape, layer_number
from lowmem_rlhf.recipe.sections import LoraSettings
from lowmem_rlhf.session.saved_lora import saved_lora

IDS = torch.randint(EOS + 1, VOCAB, (14,), generator=torch.Generator().manual_seed(3)).tolist()
LAYERS = 3
EXACT = {"rtol": 0, "atol": 1e-5}
SETTINGS = Settings(
    quantization="nf4",
    compute_dtype="bfloat16",
    gradient_checkpointing=False,
    offload_checkpoints=False,
    micro_batch_tokens=1024,
    score_batch_tokens=1024,
    rollout_batch_size=1,
    rollout_weights="quantized",
    logits_tile_tokens=64,
    optim="adamw",
    lora={},
)
Q = "model.layers.1.self_attn.q_proj"
# what peft is told: r is 4 and lora_alpha 6 besides
SHAPES = {
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "regex": {"target_modules": r".*\.[02]\.(self_attn|mlp)\.(q_proj|up_proj)", "use_rslora": True},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 2]},
    "one layer": {"target_modules": ["v_proj", "c_attn"], "layers_to_transform": 2, "layers_pattern": "layers"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r"^model.layers.[01].*(q|o)_proj": 7, "down_proj": 2, "fc9": 3},
        "alpha_pattern": {"layers.2.mlp.gate_proj": 9.5, "q_proj": 3},
        "use_rslora": True,
    },
    "whole names": {"target_modules": [Q, "model.layers.2.mlp.up_proj"], "rank_pattern": {Q: 1}},  # as EVA has them
    "left out": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\.self_attn\.k_proj"},
    "no biases": {"target_modules": ["q_proj"], "bias": "all", "init_lora_weights": "orthogonal"},
}


def saved_by_peft(folder: Path, family: str = "llama", seed: int = 1, **settings) -> PeftModel:
    """Write an adapter that stock peft made, and return it on its model."""
    given = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    made = get_peft_model(tiny_model(family, num_hidden_layers=LAYERS), LoraConfig(**given))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    made.peft_config["default"].base_model_name_or_path = f"tiny/{family}"
    made.save_pretrained(folder, save_embedding_layers=False)
    return made


def base_of(family: str = "llama", **shape) -> SharedBase:
    return SharedBase(tiny_model(family, num_hidden_layers=LAYERS), tiny_tokenizer(), f"tiny/{family}", **shape)


def dims_of(family: str):
    config = tiny_config(family, num_hidden_layers=LAYERS)
    return dimensions_from_config(json.loads(config.to_json_string(use_diff=False)), family)


def states(base: SharedBase, role: str) -> torch.Tensor:
    with base.role(role):
        return base.states(base.layout.lay_out([Group(IDS[:1], [IDS[1:]], [0])], CPU))


def logits(base: SharedBase, role: str = POLICY) -> torch.Tensor:
    return base.head.logits(states(base, role))


@torch.no_grad()
def stock_logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([IDS[:-1]], dtype=torch.long, device="cpu")).logits[0]


@pytest.mark.parametrize("kind", SHAPES)
def test_an_adapter_of_stock_peft_is_the_same_here_in_the_plan_merged_and_saved_again(kind, tmp_path):
    stock = saved_by_peft(tmp_path / "adapter", **SHAPES[kind])
    saved = saved_adapter(str(tmp_path / "adapter"), "tiny/llama")
    base = base_of(**saved.shape.values)
    base.start_from(saved)
    base.add_role(CRITIC, **saved.shape.values, below=INITIAL)
    wanted = stock_logits(stock)
    without = stock_logits(tiny_model("llama", num_hidden_layers=LAYERS))
    assert (wanted - without).abs().max() > 0.05
    for role in (POLICY, REFERENCE, CRITIC):
        torch.testing.assert_close(logits(base, role), wanted, **EXACT)

    mine = {name: p for name, p in base.trainable().items() if f".{POLICY}." in name}
    assert dims_of("llama").adapted(saved.shape).parameters == sum(p.numel() for p in mine.values())
    by_layer = {layer for layer, p in stock.base_model.model.named_modules() if hasattr(p, "lora_A")}
    lora = LoraFile(saved)
    assert set(lora.layers) == by_layer
    for layer in by_layer:
        b, a = lora.factors(layer, transposed=False)
        torch.testing.assert_close(b @ a, stock.get_submodule(f"base_model.model.{layer}").get_delta_weight("default"))

    base.save_adapter(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=LAYERS), tmp_path / "again")
    torch.testing.assert_close(stock_logits(again), wanted, **EXACT)
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert written["use_rslora"] is bool(SHAPES[kind].get("use_rslora"))
    assert saved_adapter(str(tmp_path / "again"), "tiny/llama").shape == saved.shape


FAMILIES = ["llama", "phi3", "gpt2", "gpt_neox", "phi", "starcoder2", "gemma"]
_ATTENTION = r"1\.(self_attn|attn|attention)\.(q_proj|o_proj|dense|qkv_proj|c_attn|query_key_value)"
CHOICES = {
    "all": {},
    "layers": {"layers_to_transform": [1, 2], "use_rslora": True, "rank_pattern": {r"2\..*": 3}},
    "regex": {"target_modules": rf".*\.({_ATTENTION}|2\.mlp\.(down_proj|c_proj|fc2|dense_4h_to_h))"},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_each_layer_of_each_family_as_the_loaded_model_has_it(family, choice):
    base = base_of(family, r=5, **CHOICES[choice])
    found = dims_of(family).adapted(LoraShape.of(5, **CHOICES[choice]))
    assert found.parameters == sum(p.numel() for p in base.trainable().values())
    ranks = [0] * LAYERS
    for name, layer in base.model.named_modules():
        if isinstance(layer, SharedLoraLinear):
            ranks[layer_number(name)] += layer.r[POLICY]
    assert [sum(row) for row in found.ranks] == ranks
    assert found.first == next(place for place, rank in enumerate(ranks) if rank)
    assert found.matrices == len(base.trainable())


def below_the_first_adapter(base: SharedBase, checkpointing: bool) -> tuple[list[bool], int, torch.Tensor]:
    """Return whether each layer's result has a gradient, bytes that autograd keeps, and the trained gradients."""
    base.set_gradient_checkpointing(checkpointing)
    kept, has_gradient = {}, []
    weights = {p.untyped_storage().data_ptr() for p in base.parameters()}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = [
        layer.register_forward_hook(lambda _, __, out: has_gradient.append(out.requires_grad))
        for layer in base.decoder.layers
    ]
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        result = states(base, POLICY)
    for hook in hooks:
        hook.remove()
    base.zero_grad()
    with base.role(POLICY):  # in which a layer is computed again
        result.square().sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in base.trainable().values()])
    return has_gradient[:LAYERS], sum(storage.nbytes() for storage in kept.values()), gradients


def test_layers_below_the_first_adapter_have_no_backward_pass_and_keep_nothing(tmp_path):
    base = base_of(layers_to_transform=[1, 2])
    fill_adapter(base)
    flags, kept, gradients = below_the_first_adapter(base, False)
    assert flags == [False, True, True]
    again, less, same = below_the_first_adapter(base, True)
    assert again == flags and less < kept
    assert [layer.gradient_checkpointing for layer in base.decoder.layers] == flags
    torch.testing.assert_close(same, gradients, rtol=0, atol=0)
    everywhere = base_of()
    _, of_all, _ = below_the_first_adapter(everywhere, False)
    only_last = base_of(layers_to_transform=[2])
    _, of_one, _ = below_the_first_adapter(only_last, False)
    assert of_all - kept == pytest.approx(kept - of_one, rel=0.02)  # as much for each layer

    base.save_adapter(tmp_path / "adapter")
    model = tiny_model("llama", num_hidden_layers=LAYERS)
    stock = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    hidden = stock.base_model.model.model(input_ids=torch.tensor([IDS[:-1]], dtype=torch.long, device="cpu"))
    hidden.last_hidden_state[0].square().sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in stock.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


def test_the_plan_of_upper_layers_keeps_what_they_keep():
    """Bytes of the update: the activations of adapted layers and of those above, and no others."""
    dims = model_dimensions("Qwen/Qwen2.5-1.5B-Instruct")
    recipe = load_recipe("sft_qwen_gsm8k", ["model=Qwen/Qwen2.5-1.5B-Instruct", "lora.r=8"])

    def memory(checkpointing: bool | int, **lora) -> Memory:
        settings = replace(SETTINGS, gradient_checkpointing=checkpointing, lora=LoraShape.of(8, **lora).values)
        return Memory(dims, recipe, settings, profile_device(find_profile("rtx-4090")))

    every, upper, nine = (memory(False, layers_to_transform=layers) for layers in (None, range(14, 28), range(9, 28)))
    one = every.one_adapter // 28
    assert (upper.one_adapter, nine.one_adapter) == (14 * one, 19 * one)
    assert upper.resident()["adapters"] == 4 * 14 * one
    kept = [each.layer_in_step(1).saved() for each in (every, upper, nine)]
    assert len(set(kept)) == 1
    for each, layers in ((every, 28), (upper, 14), (nine, 19)):
        assert max(moment.get("stored_activations", 0) for moment in each._pass_moments(1, True)) == layers * kept[0]
    hidden = upper.layer_in_step(1).hidden
    moments = memory(True, layers_to_transform=range(14, 28))._pass_moments(1, True)
    assert max(moment.get("stored_activations", 0) for moment in moments) == 14 * hidden


@pytest.mark.parametrize("dequantize", [False, True])
def test_an_nf4_base_decodes_any_shape_as_it_trains(dequantize, tiny_folder):
    shape = SHAPES["patterns"] | {"layers_to_transform": [1], "alpha_pattern": {"gate_proj": 9.5}}
    base = SharedBase.load(str(tiny_folder), CPU, "nf4", "float32", join=True, r=4, lora_alpha=6, **shape)
    fill_adapter(base)
    wanted = logits(base).detach()
    with torch.no_grad(), base.decoding(dequantize=dequantize):
        torch.testing.assert_close(logits(base), wanted, rtol=1e-4, atol=1e-4)
    layers = {layer.r[POLICY]: layer for layer in base.adapter_layers()}
    assert set(layers) == {7, 2, 4} and layers[2].scaling[POLICY] == 6 / 2**0.5
    assert {layer.scaling[POLICY] for layer in base.adapter_layers()} == {6 / 2, 6 / 7**0.5, 6 / 2**0.5, 9.5 / 2}


# What is refused, or lies with what


def refused(work, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        work(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_conv1d_and_biases(tmp_path):
    """GPT-2's weights are stored the other way round, and have biases."""
    stock = saved_by_peft(tmp_path / "a", "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    saved = saved_adapter(str(tmp_path / "a"), "tiny/gpt2")
    base = base_of("gpt2", **saved.shape.values)
    base.start_from(saved)
    torch.testing.assert_close(logits(base), stock_logits(stock), **EXACT)
    saved_by_peft(tmp_path / "b", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True, bias="lora_only")
    said = refused(saved_adapter, str(tmp_path / "b"), "tiny/gpt2")
    assert "has bias=lora_only, and with it base_model.model.transformer.h.0.attn.c_attn" in said
    assert "the base's own biases were trained, which all roles share" in said


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_start_that_changed_the_base_is_taken_once_peft_has_converted_it(use_rslora, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights="pissa", use_rslora=use_rslora, target_modules=["q_proj"])
    made = get_peft_model(tiny_model("llama", num_hidden_layers=LAYERS), config)
    made.peft_config["default"].init_lora_weights = True  # as saved beside the changed base
    made.save_pretrained(tmp_path / "start")
    made.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in made.named_parameters():
            if ".lora_" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    made.save_pretrained(tmp_path / "changed")
    assert "began as pissa, which changes the base's weights" in refused(
        saved_adapter, str(tmp_path / "changed"), "tiny/llama"
    )
    made.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    saved = saved_adapter(str(tmp_path / "converted"), "tiny/llama")
    base = base_of(**saved.shape.values)
    base.start_from(saved)
    torch.testing.assert_close(logits(base), stock_logits(made), rtol=0, atol=1e-4)


WRONG = {
    r".*self_attn.*": "fits model.layers.0.self_attn of 'tiny/llama' too, a LlamaAttention; adapters lie beside linear "
    "layers inside the model: let it end in their names, such as those of model.layers.0.self_attn.q_proj",
    "nothing": "lora.target_modules='nothing' does not fit 'tiny/llama'",
    r".*q_proj|lm_head": "fits lm_head of 'tiny/llama' too",
}


@pytest.mark.parametrize("regex", WRONG)
def test_a_regular_expression_that_fits_anything_else_is_refused(regex):
    assert WRONG[regex] in refused(base_of, target_modules=regex)


NOWHERE = {
    "q_proj": (
        {"target_modules": "q_proj"},
        "no linear layer of this llama model; there are model.layers.0.self_attn.",
    ),
    "hint": ({"target_modules": "q_proj"}, "for all layers of that name write [q_proj]"),
    "list": ({"target_modules": ["q_prj"]}, "the linear layers of a llama block are q_proj, k_proj, v_proj"),
    "layer": ({"layers_to_transform": [0, 3]}, "lora.layers_to_transform: got 3; the model has 3 layers, 0 to 2"),
    "ranks": ({"rank_pattern": {"fc1": 2}}, "lora.rank_pattern: 'fc1' fits the end of no adapted layer's name"),
    "alphas": ({"target_modules": ["q_proj"], "alpha_pattern": {"k_proj": 2}}, "lora.alpha_pattern: 'k_proj' fits"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_a_plan_says_what_is_not_there(case):
    shape, said = NOWHERE[case]
    assert said in refused(dims_of("llama").adapted, LoraShape.of(**shape))


def lora(**values) -> LoraSettings:
    return LoraSettings.model_validate(values)


BAD = {
    "layers_to_transform=[8-3]": "a range goes up",
    "layers_to_transform=[-1]": "got -1; give numbers of layers from 0, or ranges such as 8-15",
    "layers_to_transform=[]": "write null for all layers",
    "target_modules=(q": "no regular expression (missing ), unterminated subpattern at position 0)",
    "rank_pattern={q_proj: 0}": "rank_pattern",
    "alpha_pattern={'(': 3}": "no regular expression",
    "modules_to_save=[lm_head]": "it would be a second copy, 16 bytes a number, of what all roles share",
    "use_dora=true": "DoRA scales the rows of whole weights to lengths of their own, which is no product of low rank",
    "bias=all": "the base's biases stay frozen: all roles share them",
    "init_lora_weights=pissa": "changes the base's weights",
}


@pytest.mark.parametrize("setting", BAD)
def test_a_recipe_says_what_its_adapter_cannot_be(setting):
    with pytest.raises(UserError) as caught:
        load_recipe("grpo_gsm8k", [f"lora.{setting}"])
    _, said = str(caught.value).splitlines()
    assert f"lora.{setting.partition('=')[0]}" in said and BAD[setting] in said


def test_layers_in_a_recipe_are_numbers_and_ranges():
    assert lora(layers_to_transform=["8-10", 2, 9]).layers_to_transform == [2, 8, 9, 10]
    assert lora(layers_to_transform="8-10").layers_to_transform == [8, 9, 10]
    assert lora(layers_to_transform=3).layers_to_transform == [3]
    with pytest.raises(
        ValueError, match="beside a regular expression in target_modules, which names the layers itself"
    ):
        lora(layers_to_transform=3, target_modules=".*q_proj")
    assert [lora(use_rslora=True).shape(r).scaling("x") for r in (16, 64)] == [2, 1]  # auto
    assert [lora().shape(r).scaling("x") for r in (16, 64)] == [2, 2]
    values = {
        "use_rslora": True,
        "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v": 2.0},
    }
    assert lora(**values, r=4).shape().values == {
        **{"r": 4, "lora_alpha": 8.0, "target_modules": "all-linear"},
        **values,
    }


def test_a_recipe_takes_the_shape_that_it_goes_on_from_or_says_where_it_differs():
    shape = LoraShape.of(4, 6, ["q_proj"], True, [1], {"q_proj": 7})
    auto = saved_lora(lora(), shape, "runs/sft")
    assert auto.shape() == shape
    assert saved_lora(auto, shape, "runs/sft") == auto  # as a resumed run reads it
    assert saved_lora(lora(r=4, use_rslora=True, layers_to_transform="1-1"), shape, "runs/sft").shape() == shape
    written_out = lora(**lora().model_dump())
    assert saved_lora(written_out, shape, "runs/sft").shape() == shape
    plain = LoraShape.of(4, 6, ["q_proj"], layers_to_transform=[1])
    assert "lora.use_rslora: got True, but" in refused(saved_lora, lora(use_rslora=True), plain, "runs/sft")
    for values, said in (
        ({"r": 8}, "lora.r: got 8, but the adapter that the recipe continues from (runs/sft) has 4"),
        ({"layers_to_transform": [0, 1]}, "lora.layers_to_transform: got 0, 1, but"),
        ({"target_modules": ["v_proj"]}, "lora.target_modules: got v_proj, but"),
        ({"target_modules": ".*q_proj"}, "lora.target_modules: got .*q_proj, but"),
        ({"rank_pattern": {"q_proj": 8}}, "lora.rank_pattern: got"),
    ):
        assert said in refused(saved_lora, lora(**values), shape, "runs/sft")


def test_an_adapter_under_the_names_of_a_whole_model_keeps_its_ranks_and_alphas(tmp_path):
    """A model for images calls the same layers otherwise, so that patterns of whole names would fit none."""
    shape = {"target_modules": ["q_proj"], "rank_pattern": {Q: 2}, "alpha_pattern": {"2.self_attn.q_proj": 9}}
    saved_by_peft(tmp_path / "adapter", layers_to_transform=[1, 2], **shape)
    name_for(tmp_path / "adapter", "wrapper", "smolvlm")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    whole = [f"model.text_model.layers.{n}.self_attn.q_proj" for n in (1, 2)]
    assert written["target_modules"] == whole and written["layers_to_transform"] is None
    assert written["rank_pattern"] == dict(zip(whole, (2, 4), strict=True))
    saved = saved_adapter(str(tmp_path / "adapter"), "tiny/llama")
    stock = saved_by_peft(tmp_path / "again", layers_to_transform=[1, 2], **shape)
    base = base_of(**saved.shape.values)
    base.start_from(saved)
    torch.testing.assert_close(logits(base), stock_logits(stock), **EXACT)


def test_an_adapter_of_the_hub_comes_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    said = refused(saved_adapter, "someone/lora", "tiny/llama")
    assert said.startswith("adapter 'someone/lora' is no folder here, and the Hugging Face Hub cannot be reached")
    repository = tmp_path / "hub" / "models--someone--lora"
    saved_by_peft(repository / "snapshots" / ("a" * 40), **SHAPES["layers"])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    saved = saved_adapter("someone/lora", "tiny/llama")
    assert saved.folder == repository / "snapshots" / ("a" * 40)
    assert saved.shape == LoraShape.of(4, 6, ["down_proj", "q_proj"], layers_to_transform=[1, 2])
    assert "does not exist" in refused(saved_adapter, "runs/lora", "tiny/llama")  # a run's folder is never looked for
