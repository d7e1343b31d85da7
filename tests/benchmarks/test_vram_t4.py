"""vram_t4.py: on the measured rows, where they are, and on rows of its own making."""

import csv
import json

import pytest
import vram_t4

CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMALL = "nobody/small"  # in no catalogue
ROW = {
    "model": SMALL,
    "quant": "nf4",
    "dq": "True",
    "prec": "bf16",
    "attn": "sdpa",
    "opt": "paged_adamw_8bit",
    "r": "8",
    "targets": "all-linear",
    "gc": "False",
    "bs": "1",
    "seq": "128",
    "peak_alloc": "1000",
    "process": "1200",
    "ctx": "141",
}


@pytest.fixture
def configs(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "nobody__small.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def rows(tmp_path):
    """Return a function that writes rows to a file."""

    def write(*changes):
        path = tmp_path / "rows.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROW)
            writer.writeheader()
            writer.writerows({**ROW, **change} for change in changes)
        return path

    return write


def test_measured_rows_are_met(capsys):
    if not vram_t4.ROWS.is_file():
        pytest.skip(f"the measured rows are not there: {vram_t4.ROWS}")
    vram_t4.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    allocated, process = found["total"]["allocated"], found["total"]["process"]
    assert len(found["rows"]) == 41 and not found["skipped"]
    assert allocated["mean"] < 0.003 and abs(allocated["worst"]) < 0.01
    assert process["mean"] < 0.015 and abs(process["worst"]) < 0.06
    for row in found["rows"]:
        assert abs(row["error"]["load"]) < 0.025 and abs(row["error"]["forward"]) < 0.01
        if row["quant"] == "none":  # loading is the same every time, so nothing is left to chance
            assert abs(row["error"]["load"]) < 1e-4
            assert abs(row["error"]["allocated"]) < 1e-3 and abs(row["error"]["process"]) < 4e-3
    for errors in found["by_model"].values():
        assert errors["process"]["mean"] < 0.02


def test_other_settings_and_missing_columns(configs, rows, capsys):
    path = rows({}, {"quant": "int8", "attn": "eager"}, {"quant": "none", "prec": "fp32", "targets": "q+v"})
    vram_t4.main(["--rows", str(path), "--configs", str(configs), "--json"])
    found = json.loads(capsys.readouterr().out)
    four, eight, full = found["rows"]
    assert set(four["error"]) == {"allocated", "process"}  # nothing else was measured
    assert four["predicted"]["load"] < eight["predicted"]["load"] < full["predicted"]["load"]
    assert four["error"]["process"] == four["predicted"]["process"] / 1200 - 1
    assert "optimizer" not in four["parts"]  # paged
    errors = [abs(row["error"]["allocated"]) for row in found["rows"]]
    assert found["total"]["allocated"]["mean"] == pytest.approx(sum(errors) / 3)
    assert abs(found["total"]["allocated"]["worst"]) == max(errors)


def test_text_and_rows_that_cannot_be_predicted(configs, rows, capsys):
    path = rows({}, {"opt": "lion"}, {"attn": "flash_attention_2"}, {"model": "nobody/nothing"})
    vram_t4.main(["--rows", str(path), "--configs", str(configs)])
    text = capsys.readouterr().out
    assert "all (1 rows)" in text and text.count("not predicted") == 3
    assert "optimizer: got 'lion'" in text and "flash_attention_2" in text


def test_nothing_to_compare_is_an_error(configs, rows, capsys):
    with pytest.raises(SystemExit) as exit_:
        vram_t4.main(["--rows", str(rows({"opt": "lion"})), "--configs", str(configs)])
    message = "no row can be predicted; the first says: optimizer: got 'lion'"
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_config_that_is_no_json_is_said(configs, rows, capsys):
    (configs / "nobody__small.json").write_text("{")
    vram_t4.main(["--rows", str(rows({}, {"model": "HuggingFaceTB/SmolLM2-135M"})), "--configs", str(configs)])
    assert "not predicted: nobody/small" in capsys.readouterr().out


def test_files_that_are_wrong(tmp_path, capsys):
    for text, message in (("model,quant\na,b\n", "lacks attn, bs, ctx"), ("model\n", "has no rows")):
        path = tmp_path / "wrong.csv"
        path.write_text(text)
        with pytest.raises(SystemExit):
            vram_t4.main(["--rows", str(path)])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        vram_t4.main(["--rows", str(tmp_path / "none.csv")])
    assert "cannot be read" in capsys.readouterr().err


def test_a_row_that_did_fit_is_predicted_without_a_limit(configs, rows, capsys):
    path = rows({"bs": "16", "seq": "4096", "attn": "eager"})
    vram_t4.main(["--rows", str(path), "--configs", str(configs), "--json"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["predicted"]["process"] > vram_t4.T4
