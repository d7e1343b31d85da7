"""A GGUF appears whole or not at all, in bounded memory, and by the user's llama.cpp where there is one."""

import json
import os
import stat
import sys

import pytest
import torch
from gguf import GGUFReader
from gguf_cases import byte_level, model_folder
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from lowmem_rlhf.display.lines import Lines
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.gguf import tensors as gguf_tensors
from lowmem_rlhf.export.gguf.write import write_gguf
from lowmem_rlhf.progress import shown_by


@pytest.fixture(autouse=True)
def no_llama_cpp_of_the_machine(monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)


@pytest.fixture
def folder(tmp_path):
    return model_folder("llama", tmp_path / "model", byte_level(pre_tokenizers.ByteLevel(False)))


def left(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "model")


def test_shards_give_the_same_file(folder, tmp_path):
    write_gguf(folder, tmp_path / "a.gguf", "f16")
    weights = load_file(folder / "model.safetensors")
    places = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: weights[name] for name, place in places.items() if place == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_gguf(folder, tmp_path / "b.gguf", "f16")
    one, other = ({t.name: t.data for t in GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in "ab")
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_a_repetition_penalty_is_what_llama_cpp_samples_with(folder, tmp_path):
    keys = ("general.sampling.penalty_repeat", "general.sampling.penalty_last_n")
    for penalty, said in ((1.0, [None, None]), (1.25, [1.25, -1])):
        write_gguf(folder, tmp_path / "m.gguf", "f16", repetition_penalty=penalty)
        fields = [GGUFReader(tmp_path / "m.gguf").get_field(key) for key in keys]
        assert [field and field.contents() for field in fields] == said


def test_rows_are_written_some_at_a_time(folder, tmp_path, monkeypatch):
    write_gguf(folder, tmp_path / "a.gguf", "q8_0")
    seen, sizes = [], []
    monkeypatch.setattr(gguf_tensors, "PIECE", 1024)
    encode = gguf_tensors.Tensor._encode
    monkeypatch.setattr(
        gguf_tensors.Tensor, "_encode", lambda self, part, on: sizes.append(part.numel()) or encode(self, part, on)
    )
    write_gguf(folder, tmp_path / "b.gguf", "q8_0", lambda done, total: seen.append((done, total)))
    assert max(sizes) <= 1024 and len(sizes) > 60
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] == sum(
        t.n_bytes for t in GGUFReader(tmp_path / "b.gguf").tensors
    )
    a, b = ((tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf"))
    assert a[-seen[-1][0] // 2 :] == b[-seen[-1][0] // 2 :]


def test_an_error_leaves_an_older_file_as_it_was(folder, tmp_path):
    target = tmp_path / "m.gguf"
    target.write_bytes(b"older")

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(folder, target, "f16", stop)
    assert target.read_bytes() == b"older" and left(tmp_path) == ["m.gguf"]


def test_a_disk_that_is_too_small_is_refused_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lowmem_rlhf.export.target.free_disk", lambda target: 1000)
    with pytest.raises(RunError, match="1,000 bytes"):
        write_gguf(folder, tmp_path / "m.gguf", "f16")
    assert left(tmp_path) == []


def test_numbers_that_float16_has_not_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    weights = {name: one.float() for name, one in weights.items()}
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        RunError, match=r"blk\.1\.ffn_up\.weight holds numbers that do not fit in float16; take --quantize bf16"
    ):
        write_gguf(folder, tmp_path / "m.gguf", "f16")
    write_gguf(folder, tmp_path / "m.gguf", "bf16")
    assert left(tmp_path) == ["m.gguf"]


def test_a_kind_that_is_not_known(folder, tmp_path):
    with pytest.raises(UserError, match="GGUF kind 'q2_k' is not known; give f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m"):
        write_gguf(folder, tmp_path / "m.gguf", "q2_k")


CONVERTER = """
import sys
assert sys.argv[2] == "--outfile" and sys.argv[4] == "--outtype"
if {fails}:
    sys.exit("no such tokenizer")
open(sys.argv[3], "wb").write(b"converted to " + sys.argv[5].encode())
"""
QUANTIZER = """#!{python}
import sys
if {fails}:
    sys.exit("cannot quantize")
open(sys.argv[2], "wb").write(open(sys.argv[1], "rb").read() + sys.argv[3].encode())
"""


def install(tmp_path, monkeypatch, converter=None, quantizer=None):
    """Put stand-ins for a user's llama.cpp where $LLAMA_CPP says."""
    root = tmp_path / "model" / "llama.cpp"
    (root / "build" / "bin").mkdir(parents=True)
    monkeypatch.setenv("LLAMA_CPP", str(root))
    if converter is not None:
        (root / "convert_hf_to_gguf.py").write_text(CONVERTER.format(fails=not converter))
    if quantizer is not None:
        path = root / "build" / "bin" / "llama-quantize"
        path.write_text(QUANTIZER.format(python=sys.executable, fails=not quantizer))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for llama-quantize is a script with a first line")
@pytest.mark.parametrize(("kind", "content"), [("q8_0", b"converted to q8_0"), ("q4_k_m", b"converted to f16Q4_K_M")])
def test_a_llama_cpp_of_the_users_is_used(kind, content, folder, tmp_path, monkeypatch, capfd):
    install(tmp_path, monkeypatch, converter=True, quantizer=True)
    with shown_by(Lines()):
        write_gguf(folder, tmp_path / "m.gguf", kind)
    assert (tmp_path / "m.gguf").read_bytes() == content and left(tmp_path) == ["m.gguf"]
    said = capfd.readouterr().err
    assert "the GGUF is written by" in said and ("llama-quantize of your llama.cpp" in said) == (kind == "q4_k_m")


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for llama-quantize is a script with a first line")
def test_a_converter_that_fails_is_said_and_replaced(folder, tmp_path, monkeypatch, capfd):
    install(tmp_path, monkeypatch, converter=False, quantizer=True)
    with shown_by(Lines()):
        write_gguf(folder, tmp_path / "m.gguf", "q4_k_m")
    assert "failed (no such tokenizer); the GGUF is written without it" in capfd.readouterr().err
    content = (tmp_path / "m.gguf").read_bytes()
    assert content[:4] == b"GGUF" and content.endswith(b"Q4_K_M") and left(tmp_path) == ["m.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for llama-quantize is a script with a first line")
def test_a_quantizer_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, quantizer=False)
    with pytest.raises(RunError, match="llama-quantize failed: cannot quantize"):
        write_gguf(folder, tmp_path / "m.gguf", "q4_k_m")
    assert left(tmp_path) == []


def test_a_converter_alone_makes_no_q4_k_m(folder, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, converter=True)
    write_gguf(folder, tmp_path / "m.gguf", "q4_k_m")
    assert GGUFReader(tmp_path / "m.gguf").fields["general.file_type"].contents() == 15


def test_a_penalty_that_a_converter_leaves_out_is_said(folder, tmp_path, monkeypatch, capfd):
    install(tmp_path, monkeypatch, converter=True)
    for penalty, said in ((1.0, False), (1.25, True)):
        with shown_by(Lines()):
            write_gguf(folder, tmp_path / "m.gguf", "q8_0", repetition_penalty=penalty)
        assert ("--repeat-penalty 1.25 --repeat-last-n -1" in capfd.readouterr().err) == said


def test_the_token_embedding_is_cut_to_the_vocabulary(tmp_path):
    tokenizer = byte_level(pre_tokenizers.ByteLevel(False))
    folder = model_folder("llama", tmp_path / "model", tokenizer)
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat((weights[name], torch.zeros(5, weights[name].shape[1], dtype=torch.float16)))
    save_file(weights, folder / "model.safetensors")
    write_gguf(folder, tmp_path / "m.gguf", "f16")
    shapes = {tensor.name: tensor.shape.tolist() for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == [48, len(tokenizer)]
