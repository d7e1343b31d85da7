"""Safetensors files read and written piece by piece, held against the safetensors library."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.shards import INDEX, SINGLE, read_header, read_shards, write_index, write_tensors


@pytest.fixture
def tensors():
    return {
        "wide": torch.randn(7, 3),
        "half": torch.randn(5, 2, 2).half(),
        "brain": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "mask": torch.tensor([True, False, True]),
        "ids": torch.arange(4),
    }


def test_tensors_and_rows_are_those_that_the_library_reads(tensors, tmp_path):
    save_file(tensors, tmp_path / SINGLE)
    found = read_shards(tmp_path)[SINGLE]
    assert found.keys() == tensors.keys()
    for name in ("wide", "half", "brain", "scalar", "empty"):
        assert torch.equal(found[name].read(), tensors[name])
        rows = [found[name].read(part) for part in found[name].rows(6)]
        assert torch.equal(torch.cat(rows).view(tensors[name].shape) if rows else tensors[name], tensors[name])
    assert torch.equal(found["wide"].read(slice(2, 5)), tensors["wide"][2:5])
    assert [part.stop - part.start for part in found["wide"].rows(6)] == [2, 2, 2, 1]
    assert not found["mask"].is_number and not found["ids"].is_number


def test_the_library_reads_what_was_written_in_pieces(tensors, tmp_path):
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL", torch.int64: "I64"}
    layout = [(name, kinds[t.dtype], tuple(t.shape), t.nbytes) for name, t in tensors.items()]
    pieces = (piece for t in tensors.values() for piece in t.reshape(-1).split(4))
    write_tensors(tmp_path / "x.safetensors", layout, pieces)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) for name, t in tensors.items())


def test_pieces_of_the_wrong_length_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="4 bytes"):
        write_tensors(tmp_path / "x", [("a", "F32", (3,), 12)], [torch.zeros(2)])


@pytest.mark.parametrize("cut", [4, 40, -8])
def test_a_file_that_is_cut_off_is_one_sentence(tensors, tmp_path, cut):
    save_file(tensors, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:cut])
    with pytest.raises(UserError, match="fetch it again"):
        read_header(tmp_path / SINGLE)


LIE = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'


@pytest.mark.parametrize("header", [b"[]", LIE, b"{", b'{"a": 1}'])
def test_a_header_that_lies_is_one_sentence(tmp_path, header):
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match="no safetensors file"):
        read_header(tmp_path / SINGLE)


def test_missing_and_mixed_up_shards_are_named(tmp_path):
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        read_shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"one.safetensors": ["a"], "two.safetensors": ["b"]}, 16)
    with pytest.raises(UserError, match=r"lacks two\.safetensors"):
        read_shards(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"two\.safetensors holds no b"):
        read_shards(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(UserError, match="outside the folder"):
        read_shards(tmp_path)
