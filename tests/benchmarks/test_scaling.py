"""scaling.py end to end on a tiny model, and a model with fewer layers."""

import json

import pytest
import scaling
import torch
from model_folders import truncated
from PIL import Image
from scaling_points import LABELS
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def found(tiny_folder, tmp_path_factory):
    """Return what a quick run prints as JSON, and its picture."""
    from contextlib import redirect_stdout
    from io import StringIO

    picture, out = tmp_path_factory.mktemp("plot") / "scaling.png", StringIO()
    with redirect_stdout(out):
        scaling.main(["--quick", "--json", "--plot", str(picture), "--model", str(tiny_folder), "--device", "cpu"])
    return json.loads(out.getvalue()), picture


def test_every_factor_has_its_points_with_time_and_peak_by_phase(found):
    result, _ = found
    by_factor = {factor: [p for p in result["points"] if p["factor"] == factor] for factor in LABELS}
    assert [p["generations"] for p in by_factor["generations"]] == [2, 4, 8, 16]
    assert [p["layers"] for p in by_factor["layers"]] == [1, 2]
    for point in result["points"]:
        assert set(point["seconds"]) == set(point["peak_bytes"]) == {"rollout", "score", "update", "step"}
        assert all(value > 0 for value in point["seconds"].values())
        assert point["peak_bytes"]["step"] > point["bytes_before"] > 0
    shallow, whole = by_factor["layers"]
    assert shallow["bytes_before"] < whole["bytes_before"]
    base = {"generations": 4, "completion_length": 16, "prompt_length": 32, "layers": 2}
    assert len({json.dumps(p["peak_bytes"]) for p in result["points"] if {k: p[k] for k in base} == base}) == 1


def test_peak_is_flat_in_generations_at_a_fixed_token_budget(found):
    result, _ = found
    points = [p for p in result["points"] if p["factor"] == "generations"]
    assert [p["fills_bounds"] for p in points] == [False, True, True, True]
    grown = result["growth"]["generations"]
    assert (grown["from"], grown["to"]) == (4, 16)
    for phase in ("score", "update"):
        work = [p["peak_bytes"][phase] - p["bytes_before"] for p in points if p["fills_bounds"]]
        assert grown["work"][phase] == max(work) / min(work) < 1.05
    assert grown["peak"]["step"] < 1.05
    assert points[-1]["update_tokens"] > 3.5 * points[1]["update_tokens"]


def test_peak_grows_with_completion_length_by_no_more_than_cache_and_a_packed_row(found):
    result, _ = found
    grown = result["growth"]["completion_length"]
    assert (grown["from"], grown["to"]) == (8, 32)
    assert grown["of_allowed"]["step"] == grown["bytes"]["step"] / (grown["kv_bytes"] + grown["row_bytes"])
    assert grown["of_allowed"]["rollout"] > 0
    assert max(grown["of_allowed"].values()) < 1


def test_picture_has_a_panel_for_each_factor(found):
    with Image.open(found[1]) as image:
        assert image.format == "PNG" and image.size[0] > 1500
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_tables_for_people(found, capsys):
    scaling.print_tables(found[0], scaling.options().parse_args(["--quick"]))
    text = capsys.readouterr().out
    assert all(label in text for label in LABELS.values())
    assert "4 to 16 completions a prompt" in text and "one packed row" in text


def test_truncated_model_is_the_first_layers_of_the_whole_one(tiny_folder, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder).model
    short = AutoModelForCausalLM.from_pretrained(truncated(tiny_folder, 1, tmp_path / "short")).model
    assert len(short.layers) == 1
    for name, p in short.named_parameters():
        assert torch.equal(p, whole.get_parameter(name))
    with pytest.raises(ValueError, match="got 3 layers"):
        truncated(tiny_folder, 3, tmp_path / "long")
