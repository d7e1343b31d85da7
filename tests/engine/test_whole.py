"""A model's files hold every tensor of it and no other, or it is refused by name: folders, shards, GGUF, rewards."""

import json
import re
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load import refuse, write_gguf
from tiny_classifiers import save_classifier, save_sentence_encoder
from tiny_models import CPU, save_tiny, tiny_base, tiny_model
from transformers import AutoModel, AutoModelForSequenceClassification

from lowmem_rlhf.algorithms.classifier.fit import _load as load_to_train
from lowmem_rlhf.engine.load import load_base
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.gguf.read import read_model
from lowmem_rlhf.export.proof.verify import stock_model
from lowmem_rlhf.recipe.sections import LearnedReward, RewardConfig
from lowmem_rlhf.rewards.loading import load_rewards

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
DAMAGE = {
    "lacks": (lambda state: state.pop(UP), f"lack 1 tensor ({UP})"),
    "lacks the head": (lambda state: state.pop("lm_head.weight"), "lack 1 tensor (lm_head.weight)"),
    "lacks many": (
        lambda state: [state.pop(key) for key in list(state) if "layers.1" in key],
        "lack 9 tensors (model.layers.1.input_layernorm.weight, ",
    ),
    "one more": (
        lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64)}),
        "hold 1 tensor (model.layers.2.mlp.up_proj.weight), which it has no place for",
    ),
    "a bias": (
        lambda state: state.update({"model.layers.0.mlp.up_proj.bias": torch.ones(128)}),
        "hold 1 tensor (model.layers.0.mlp.up_proj.bias)",
    ),
    "turned": (
        lambda state: state.update({UP: state[UP].T.contiguous()}),
        f"hold 1 of another shape ({UP}: (64, 128) in place of (128, 64))",
    ),
    "longer": (
        lambda state: state.update({NORM: torch.ones(65)}),
        f"hold 1 of another shape ({NORM}: (65,) in place of (64,))",
    ),
}


def changed(folder, target, change):
    """Return a copy of a model folder whose tensors were changed."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    state = {name: tensor.clone() for name, tensor in state.items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_folder_whose_tensors_are_not_the_models_is_refused_by_name(tiny_folder, tmp_path, quantization, damage):
    change, said = DAMAGE[damage]
    refuse(changed(tiny_folder, tmp_path / "m", change), said, "fetch the model again", quantization=quantization)


def test_every_kind_is_named_at_once(tiny_folder, tmp_path):
    def change(state):
        for kind in ("lacks", "one more", "longer"):
            DAMAGE[kind][0](state)

    refuse(changed(tiny_folder, tmp_path / "m", change), *(DAMAGE[kind][1] for kind in ("lacks", "one more", "longer")))


def valued(key, value, whole=False):
    """Return a change that puts a value into a tensor, or fills it."""

    def change(state):
        state[key] = torch.full_like(state[key], value) if whole else state[key].clone()
        state[key].view(-1)[5] = value

    return change


NO_NUMBERS = "values that are not finite in 1 tensor"
WEIGHTS = {
    "nan": (valued(UP, torch.nan), f"{NO_NUMBERS} ({UP})"),
    "-inf": (valued(UP, -torch.inf), f"{NO_NUMBERS} ({UP})"),
    "in the embedding": (valued("model.embed_tokens.weight", torch.nan), f"{NO_NUMBERS} (model.embed_tokens.weight)"),
    "in a norm": (valued(NORM, torch.inf), f"{NO_NUMBERS} ({NORM})"),
    "in the head": (valued("lm_head.weight", torch.nan), f"{NO_NUMBERS} (lm_head.weight)"),
    "zeros": (valued(UP, 0, whole=True), f"nothing but zeros in 1 tensor ({UP})"),
    "no embedding": (
        valued("model.embed_tokens.weight", 0, whole=True),
        "nothing but zeros in 1 tensor (model.embed_tokens.weight)",
    ),
}


@pytest.mark.parametrize("damage", WEIGHTS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_weights_that_are_no_numbers_are_refused_by_name(tiny_folder, tmp_path, quantization, damage):
    change, said = WEIGHTS[damage]
    refuse(changed(tiny_folder, tmp_path / "m", change), said, "fetch the model again", quantization=quantization)


def test_large_weights_are_numbers_where_the_dtype_has_them(tiny_folder, tmp_path):
    large = changed(tiny_folder, tmp_path / "m", valued(UP, 1e5))
    for quantization in ("none", "nf4"):
        load_base(str(large), quantization, "bfloat16", CPU)
        with pytest.raises(UserError, match=r"not finite .*float16 has no number above 65504.*compute_dtype=bfloat16"):
            load_base(str(large), quantization, "float16", CPU)
    refuse(large, NO_NUMBERS, "float16, in which int8 is made, has no number above 65504", quantization="int8")
    zero_norm = changed(tiny_folder, tmp_path / "gemma-like", valued(NORM, 0, whole=True))  # where it is one plus this
    load_base(str(zero_norm), "none", "float32", CPU)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_weights_of_a_dtype_that_is_no_weights_are_refused(tiny_folder, tmp_path, dtype):
    folder = changed(tiny_folder, tmp_path / "m", lambda state: state.update({UP: state[UP].to(dtype)}))
    refuse(folder, "1 weights that are no floating-point numbers", f"({UP} is", "take the original 16-bit weights")


CUT = {
    "empty": (lambda data: b"", "model.safetensors is no safetensors file"),
    "header": (lambda data: data[:100], "model.safetensors is cut short in its header"),
    "end": (lambda data: data[:-1], "model.safetensors is cut short: it has"),
    "longer": (lambda data: data + b"abc", "model.safetensors has 3 bytes too many"),
    "garbage": (lambda data: data[:8] + b"x" * (len(data) - 8), "cannot be read as a safetensors file"),
    "a pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS"),
}


@pytest.mark.parametrize("damage", CUT)
def test_a_file_that_is_cut_or_no_model_is_named(tiny_folder, tmp_path, damage):
    change, said = CUT[damage]
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    refuse(folder, said, "fetch the model again")


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {"a": 3}}', '{"weight_map": [1]}', "{}", '{"weight_'])
def test_an_index_that_is_none_is_named(tiny_folder, tmp_path, index):
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    refuse(folder, "model.safetensors.index.json cannot be read as an index")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_tied_weights_may_be_left_out_but_not_all_of_them(tmp_path, quantization):
    folder = save_tiny("llama-tied-biased", tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_base(str(folder), quantization, "float32", CPU)

    def only_head(state):
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight")

    model, _ = load_base(str(changed(folder, tmp_path / "head", only_head)), quantization, "float32", CPU)
    assert torch.equal(
        model.get_input_embeddings().weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    )
    none = changed(folder, tmp_path / "none", lambda state: state.pop("model.embed_tokens.weight"))
    refuse(none, "lack 2 tensors (lm_head.weight, model.embed_tokens.weight)", quantization=quantization)


def test_buffers_that_older_versions_stored_are_no_weights(tmp_path):
    def buffers(state):
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)

    load_base(str(changed(save_tiny("llama", tmp_path / "l"), tmp_path / "old", buffers)), "none", "float32", CPU)

    def masks(state):
        for name in ("bias", "masked_bias"):
            state[f"transformer.h.0.attn.{name}"] = torch.ones(1, 1, 8, 8)

    gpt2 = save_tiny("gpt2", tmp_path / "g", n_embd=64)
    for quantization in ("none", "nf4"):  # its layers are turned while they are quantized
        load_base(str(gpt2), quantization, "float32", CPU)
    load_base(str(changed(gpt2, tmp_path / "old-g", masks)), "none", "float32", CPU)


def test_a_folder_of_the_body_alone_lacks_its_head(tiny_folder, tmp_path):
    AutoModel.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    shutil.copy(tiny_folder / "tokenizer.json", tmp_path)
    refuse(tmp_path, "lack 1 tensor (lm_head.weight)")


def test_shards(tiny_folder, tmp_path):
    model = tiny_model("llama", vocab_size=260, hidden_size=64, intermediate_size=128)
    whole = shutil.copytree(tiny_folder, tmp_path / "whole")
    (whole / "model.safetensors").unlink()
    model.save_pretrained(whole, max_shard_size="100KB")
    shards = sorted(whole.glob("*.safetensors"))
    assert len(shards) > 2
    load_base(str(whole), "nf4", "float32", CPU)
    lacks_file = shutil.copytree(whole, tmp_path / "lacks-file")
    (lacks_file / shards[-1].name).unlink()
    refuse(lacks_file, "files that model.safetensors.index.json names are missing", shards[-1].name)
    lacks_entry = shutil.copytree(whole, tmp_path / "lacks-entry")
    index = json.loads((whole / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if file != shards[-1].name}
    (lacks_entry / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(lacks_entry, "its files lack")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_experts_are_looked_at_too(tmp_path, monkeypatch, quantization):
    from tiny_models import FAMILIES

    monkeypatch.setitem(FAMILIES, "mixtral", ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}))
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    load_base(str(folder), quantization, "float32", CPU)
    one = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    refuse(
        changed(folder, tmp_path / "one", lambda state: state.pop(one)),
        "model.layers.1.mlp.experts.gate_up_proj) cannot be made",
        quantization=quantization,
    )

    def without(state, part):
        for key in [key for key in state if part in key]:
            del state[key]

    for part in ("experts.2.", ".w3."):
        cut = changed(folder, tmp_path / f"without{part}", lambda state, part=part: without(state, part))
        with pytest.raises(UserError, match=r"experts\.(gate_up|down)_proj"):
            load_base(str(cut), quantization, "float32", CPU)


GGUF_DAMAGE = {
    "lacks": ({"blk.1.ffn_up.weight": None}, f"lack 1 tensor ({UP})"),
    "a bias": (
        {"blk.0.attn_q.bias": np.ones(48, dtype=np.float32)},
        "of its 62,112 numbers transformers makes a model of 62,064 (1 tensor (blk.0.attn_q.bias))",
    ),
    "a layer": ({"blk.7.ffn_up.weight": np.ones((64, 48), dtype=np.float32)}, "(1 tensor (blk.7.ffn_up.weight))"),
    "factors of positions": ({"rope_freqs.weight": np.ones(6, dtype=np.float32)}, "(1 tensor (rope_freqs.weight))"),
    "turned": (
        {"blk.1.ffn_up.weight": np.ones((48, 64), dtype=np.float32)},
        f"hold 1 of another shape ({UP}: (48, 64) in place of (64, 48))",
    ),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE)
def test_a_gguf_whose_tensors_are_not_the_models_is_refused_by_name(tmp_path, monkeypatch, damage):
    other, said = GGUF_DAMAGE[damage]
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))
    written = {**other}

    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name, tensor):
            found = written.pop(name, tensor)
            if found is not None:
                super().add_tensor(name, found)

        def write_header_to_file(self):
            for name, tensor in [*written.items()]:
                self.add_tensor(name, tensor)
            super().write_header_to_file()

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    write_gguf(tmp_path / "tiny.gguf")
    refuse(tmp_path / "tiny.gguf", said)
    assert not list((tmp_path / "cache").glob("gguf/*"))


def test_a_gguf_whose_scaling_of_positions_would_be_left_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWMEM_RLHF_CACHE", str(tmp_path / "cache"))

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self):
            self.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            self.add_rope_scaling_factor(8.0)
            super().write_header_to_file()

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    write_gguf(tmp_path / "tiny.gguf")
    refuse(tmp_path / "tiny.gguf", "leaves its linear scaling of positions out; the model would compute something else")


def reward(folder, function="classifier", **options):
    return load_rewards([RewardConfig(function=function, options={"model": str(folder), **options})])[0]


def test_a_classifier_as_a_reward(tmp_path):
    whole = save_classifier(tmp_path / "whole")
    reward(whole, label=1)
    layer = "bert.encoder.layer.1.output.dense.weight"
    for name, change, said in (
        (
            "head",
            lambda s: s.pop("classifier.weight"),
            "is no sequence classifier: its files lack 1 tensor (classifier.w",
        ),
        ("body", lambda s: s.pop(layer), f"its files lack 1 tensor ({layer})"),
        ("deeper", lambda s: s.update({layer.replace("1", "7"): s[layer]}), "hold 1 tensor (bert.encoder.layer.7"),
        ("other", lambda s: s.update({"classifier.dense.weight": s[layer]}), "hold 1 tensor (classifier.dense.weight)"),
        (
            "wide",
            lambda s: s.update({"classifier.weight": torch.ones(5, 32)}),
            "of another shape (classifier.weight: (5,",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            reward(changed(whole, tmp_path / name, change), label=1)
    # another kind's head, which stock transformers leaves unread as well
    reward(changed(whole, tmp_path / "both", lambda s: s.update({"cls.predictions.bias": torch.ones(9)})), label=1)


def test_an_encoder_as_a_reward(tmp_path):
    whole = save_sentence_encoder(tmp_path / "whole")
    key = "encoder.layer.0.output.dense.weight"
    reward(changed(whole, tmp_path / "p", lambda s: s.pop("pooler.dense.weight")), "similarity")  # nothing reads it
    for name, change, said in (
        ("lacks", lambda s: s.pop(key), f"is no sentence encoder: its files lack 1 tensor ({key})"),
        ("deeper", lambda s: s.update({key.replace("0", "7"): s[key]}), "hold 1 tensor (encoder.layer.7"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            reward(changed(whole, tmp_path / name, change), "similarity")


def test_a_classifier_that_is_to_be_trained_may_begin_with_a_fresh_head_and_nothing_else(tmp_path):
    encoder, labels = save_sentence_encoder(tmp_path / "encoder"), ["a", "b", "c"]
    load_to_train(LearnedReward(model=str(encoder)), labels)
    other = save_classifier(tmp_path / "other")  # of two labels
    model = load_to_train(LearnedReward(model=str(other)), labels).model
    assert isinstance(model, AutoModelForSequenceClassification.from_config(model.config).__class__)
    assert model.classifier.weight.shape[0] == 3
    key = "encoder.layer.0.output.dense.weight"
    for name, change, said in (
        ("lacks", lambda s: s.pop(key), f"its files lack 1 tensor (bert.{key})"),
        ("deeper", lambda s: s.update({key.replace("0", "7"): s[key]}), "encoder.layer.7"),
        ("wide", lambda s: s.update({key: torch.ones(7, 7)}), f"of another shape (bert.{key}: (7, 7)"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            load_to_train(LearnedReward(model=str(changed(encoder, tmp_path / name, change))), labels)


def test_an_export_that_is_not_whole_is_no_proof(tiny_folder, tmp_path):
    cut = changed(tiny_folder, tmp_path / "m", DAMAGE["lacks"][0])
    with pytest.raises(RunError, match=r"cannot be loaded again: .*lack 1 tensor"), stock_model(cut, CPU, False):
        pass
    with pytest.raises(UserError, match="lack 1 tensor"):
        read_model(tmp_path / "any.gguf", cut)


@pytest.mark.parametrize("names", [["c_attn"], ["input_layernorm"], ["q_proj"]])
def test_an_adapter_beside_other_layers_is_refused(tmp_path, names):
    from lowmem_rlhf.architecture.adapters import saved_adapter

    base, _ = tiny_base("llama")
    base.save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"target_modules": names, "exclude_modules": None}
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"the adapter in .* does not fit this base"):
        base.add_saved_role("reward", saved_adapter(str(tmp_path), config["base_model_name_or_path"]))


def test_an_adapter_and_a_head_are_the_roles_or_refused_by_name(tmp_path):
    from lowmem_rlhf.engine.roles import POLICY

    base, _ = tiny_base("llama")
    base.add_head(POLICY)
    base.save_adapter(tmp_path / "whole")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    for name, file, change, said in (
        ("lacks", "adapter_model", lambda s: s.pop(key), f"lack 1 tensor ({key})"),
        ("more", "adapter_model", lambda s: s.update({key.replace("1", "7"): s[key]}), "hold 1 tensor (base_model"),
        (
            "wide",
            "adapter_model",
            lambda s: s.update({key: torch.ones(5, 48)}),
            f"({key}: (5, 48) in place of (4, 48))",
        ),
        ("head", "head", lambda s: s.update({"bias": torch.ones(1)}), "hold 1 tensor (bias)"),
        ("nan", "adapter_model", valued(key, torch.nan), f"not finite in 1 tensor ({key})"),
        ("inf", "head", valued("weight", torch.inf), "the head in"),
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / name)
        state = load_file(folder / f"{file}.safetensors")
        change(state)
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / f"{file}.safetensors")
        before = base.adapter_state()
        with pytest.raises(UserError, match=re.escape(said)):
            base.load_role(folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in base.adapter_state().items())
