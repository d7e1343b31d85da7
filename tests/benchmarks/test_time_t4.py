"""time_t4.py: on the measured rows, where they are, and on rows of its own making."""

import csv
import json
from collections import Counter

import pytest
import time_t4
from stock_memory.stock_run import StockRun
from stock_memory.timed import Kernel, product, seconds, step_kernels

from lowmem_rlhf.architecture.dimensions import dimensions_from_config
from lowmem_rlhf.hardware.speed import Speed
from lowmem_rlhf.planning.time.rates import ATTENTION, START, Rates, rates

CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}
ROW = {"quant": "nf4", "dq": "False", "prec": "fp16", "attn": "sdpa", "opt": "adamw", "r": "8", "targets": "q+v"}
ROW |= {"gc": "True", "bs": "2", "seq": "128", "step_s": "0.05"}


def run(**changes) -> StockRun:
    settings = {"quantization": "none", "attention": "eager", "targets": (), "gradient_checkpointing": False, **changes}
    return StockRun(dimensions_from_config(CONFIG, "tiny"), 2, 128, **settings)


def flops(kernels: Counter[Kernel], width: int) -> int:
    return sum(count * kernel.flops for kernel, count in kernels.items() if kernel.width == width)


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"nobody__{name}.json").write_text(json.dumps(CONFIG))

    def write(*changes):
        path = tmp_path / "rows.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, {"model": "", **ROW})
            writer.writeheader()
            writer.writerows({"model": "nobody/one", **ROW, **change} for change in changes)
        return ["--rows", str(path), "--configs", str(folder)]

    return write


def test_measured_rows_are_met_by_constants_of_other_models(capsys):
    if not time_t4.ROWS.is_file():
        pytest.skip(f"the measured rows are not there: {time_t4.ROWS}")
    time_t4.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 41 and not found["skipped"]
    assert found["total"]["mean"] < 0.09 and abs(found["total"]["worst"]) < 0.2
    assert all(set(one) == {"attention", "start"} for one in found["constants"].values())
    assert found["constants"]["all"] == {"attention": ATTENTION, "start": START}


def test_the_products_of_a_step_are_the_model_s():
    dims, tokens = dimensions_from_config(CONFIG, "tiny"), 256
    heads = 2 * 4 * 3  # rows, heads, layers
    scores = 2 * 2 * heads * 128 * 128 * 64  # both products of attention, all scores
    once = 2 * tokens * (dims.linear_parameters + dims.vocab_size * dims.hidden_size)
    # without adapters nothing but the embedding asks for a gradient: a product for the input of each layer
    assert flops(step_kernels(run(targets=("q", "v"), r=8)), 2) == 2 * once + 3 * scores
    adapters = dims.lora_parameters(8, ["q_proj", "v_proj"])
    assert flops(step_kernels(run(targets=("q", "v"), r=8)), 4) == 3 * 2 * tokens * adapters
    sdpa = step_kernels(run(targets=("q", "v"), r=8, attention="sdpa"))
    assert sum(n * k.flops for k, n in sdpa.items() if k.attention) == round(3.5 * scores / 2)


def test_recomputed_layers_run_again_and_quantized_weights_are_made_each_way():
    plain, again = (step_kernels(run(targets=("q",), gradient_checkpointing=one)) for one in (False, True))
    layers = 2 * 256 * dimensions_from_config(CONFIG, "tiny").linear_parameters
    # the region stops before its last product, whose result nothing reads
    assert 0.6 * layers < flops(again, 2) - flops(plain, 2) <= 1.7 * layers
    assert again.total() > plain.total()
    nf4 = step_kernels(run(targets=("q",), quantization="nf4"))
    codes = dimensions_from_config(CONFIG, "tiny").linear_parameters // 2
    assert sum(n * k.bytes for k, n in nf4.items()) > sum(n * k.bytes for k, n in plain.items()) + 2 * codes
    int8 = step_kernels(run(targets=("q",), quantization="int8"))
    head, scores = 2 * 2 * 256 * 1000 * 256, 3 * 2 * 2 * 24 * 128 * 128 * 64  # in fp32 beside quantized weights
    assert flops(int8, 2) == flops(nf4, 2) == flops(plain, 2) - head - scores


def test_a_kernel_takes_the_longer_of_arithmetic_and_bytes_and_its_start():
    card = Rates(half=100.0, single=10.0, bandwidth=50.0, attention=0.5, start=1.0, replayed=0.1, bus=1.0)
    assert seconds({Kernel(flops=200, width=2, bytes=50): 1}, card) == 3.0
    assert seconds({Kernel(flops=200, width=2, bytes=500): 2}, card) == 22.0
    assert seconds({Kernel(flops=200, width=4, attention=True).less_started(): 1}, card) == 40.0
    assert product(3, 5, 7, 2) == Kernel(flops=210, width=2, bytes=100)
    t4 = rates(Speed(65, 8.14, 320, steady_half_tflops=24, steady_bandwidth_gb_s=220))
    assert (t4.half, t4.bandwidth) == (24e12, 220e9)


def test_a_model_is_predicted_with_the_constants_of_others(rows, capsys, monkeypatch):
    monkeypatch.setattr(time_t4, "ROWS", time_t4.Path("nowhere.csv"))
    time_t4.main(
        [*rows({}, {"model": "nobody/two", "step_s": "0.01"}, {"model": "nobody/two", "step_s": "0.008"}), "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["constants"]["nobody/one"] != found["constants"]["nobody/two"]
    for row in found["rows"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert set(found["total"]) == {"mean", "worst", "signed"}


def test_the_table_names_what_cannot_be_predicted(rows, capsys, monkeypatch):
    monkeypatch.setattr(time_t4, "ROWS", time_t4.Path("nowhere.csv"))
    time_t4.main(rows({}, {"model": "nobody/nothing"}))
    assert "not predicted: nobody/nothing:" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "sentence"), [(["--rows", "no.csv"], "no.csv cannot be read")])
def test_a_file_that_cannot_be_used_gets_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        time_t4.main(arguments)
    assert sentence in capsys.readouterr().err


def test_a_file_without_times_gets_a_sentence(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text("model,quant\nx,nf4\n")
    with pytest.raises(SystemExit, match="2"):
        time_t4.main(["--rows", str(path)])
    assert "lacks" in (told := capsys.readouterr().err) and "step_s" in told
