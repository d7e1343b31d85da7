"""The merge benchmark on a small model: both sides run, write the same tensors and are told apart."""

import argparse
import json
import os
import sys

import merge
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the figures of one merge by each side of a model of two layers."""
    folder = tmp_path_factory.mktemp("merge")
    flags = ["--layers", "2", "--hidden", "256", "--vocabulary", "1000", "--shard-mb", "2", "--repeats", "1"]
    work = merge.options().parse_args([*flags, "--folder", str(folder)])
    size = merge.make_model(folder, work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["merge.py", *flags])
        yield merge.measure(work, lambda text: None), size, folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_both_sides_merge_the_same_model(found):
    figures, size, folder = found
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    assert figures["largest_difference"] < 1e-3
    assert all(figures[side]["peak_bytes"] > figures[side]["beyond_libraries"] > 0 for side in merge.SIDES)


def test_table_says_whether_the_bounds_hold(capsys):
    ours = {"seconds": 2.0, "peak_bytes": 4e8, "beyond_libraries": 1e8}
    figures = {"ours": ours, "peft": {"seconds": 1.0, "peak_bytes": 4e9, "beyond_libraries": 2e9}}
    merge.print_table(figures | {"largest_difference": 0.0}, 2_200_000_000)
    text = capsys.readouterr().out
    assert "peak: 0.100 of peft's; must be at most 0.3: holds" in text
    assert "time: 2.000 of peft's; must be at most 1.5: MISSED" in text


def test_a_tensor_that_differs_is_told(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", 1.5)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    assert merge.compare(tmp_path / "a", tmp_path / "b") == pytest.approx(1 / 3)


def test_the_defaults_are_a_model_of_at_least_2_gb():
    work: argparse.Namespace = merge.options().parse_args([])
    linears = 4 * 2048 * 2048 // 2 + 3 * 2048 * 5632  # q and o; k and v are small
    assert 2 * (work.layers * linears + 2 * work.vocabulary * work.hidden) > 2e9
