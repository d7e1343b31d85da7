"""The engine's equalities on a card: its passes are the CPU's, and its peak is what the live bytes say.

On the virtual card attention takes SDPA's math path, the only one that it has, and on the CPU beside it too.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

FAMILIES = ("llama", "qwen2", "mistral", "gemma2", "gemma3", "gpt2", "lfm2", "qwen3_5", "granite_hybrid", "gemma4")
CLOSE = 1e-5
PHASES = ("rollout", "score", "update, kept", "update, recomputed")
# The card's peak and the counter's, either way; the card rounds each allocation up to 512 bytes, and in 16 bits the
# tensors of the tiny model are small.
AGREES = 1.05
# The largest attention call of a pass of 256 tokens: 4 completions by 4 heads, 47 queries, 64 + 47 keys. Inside softmax
# the math path compares its scores with minus infinity, a byte each, where the counter does not look.
SCORES = 4 * 4 * 47 * (64 + 47)
# An activated gate of a pass of 252 tokens. The card has no kernel of SiLU's gradient, which is then several products.
GATE = 252 * 160


@pytest.fixture(scope="module")
def output(on_the_card, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    on_the_card("integration/card_engine_process.py", str(folder), made=folder / "peaks.json")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def numbers(request, output) -> dict[str, dict[str, torch.Tensor]]:
    """Return what the CPU and the card computed for a family."""
    return {device: load_file(output / f"{request.param}-{device}.safetensors") for device in ("cpu", "card")}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def test_every_number_of_the_card_is_the_cpus(numbers):
    cpu, card = numbers["cpu"], numbers["card"]
    assert cpu.keys() == card.keys() and len(cpu) == 12 + 3 + 6 + 6 + 2 * ("offloaded" in cpu)
    for name, want in cpu.items():
        if name == "offloaded/freed":
            continue
        assert torch.isfinite(card[name].double()).all() and card[name].any(), name
        assert distance(card[name], want) < CLOSE, name
    for name in ("lengths", "tokens"):
        assert torch.equal(card[f"{name}/at once"], cpu[f"{name}/at once"])


def test_packed_passes_on_the_card_are_the_stock_models_on_single_sequences(numbers):
    card = numbers["card"]
    for role in ("policy", "reference"):
        assert distance(card[f"score/{role}/whole"], card[f"stock/{role}"]) < CLOSE
    assert distance(card["update/kept/whole"], card["stock/gradient"]) < CLOSE
    assert distance(card["stock/policy"], card["stock/reference"]) > 1e-2  # the adapter matters


def test_split_is_whole_and_recomputed_is_kept_on_the_card(numbers):
    card = numbers["card"]
    for cut in ("split", "alone"):
        for role in ("policy", "reference"):
            assert distance(card[f"score/{role}/{cut}"], card[f"score/{role}/whole"]) < CLOSE
    for activations in ("kept", "recomputed"):
        for cut in ("whole", "split", "alone"):
            assert distance(card[f"update/{activations}/{cut}"], card["update/kept/whole"]) < CLOSE


def test_tiled_logprobs_on_the_card_are_the_full_ones(numbers):
    card = numbers["card"]
    for name in ("logps", "entropies", "gradient"):
        assert distance(card[f"tiled/{name}"], card[f"full/{name}"]) < CLOSE


def test_waves_on_the_card_write_the_completions_of_one_batch(numbers):
    card = numbers["card"]
    for name in ("lengths", "tokens"):
        assert torch.equal(card[f"{name}/at once"], card[f"{name}/in waves"])
    assert distance(card["sampled/in waves"], card["sampled/at once"]) < CLOSE
    lengths = card["lengths/at once"]
    assert int(lengths.min()) < 8 < int(lengths.max()), "no row left the batch early"


def test_an_embedding_in_host_memory_gives_the_same_numbers_and_frees_the_card(output):
    found = [load_file(output / f"{family}-card.safetensors") for family in FAMILIES]
    offloaded = [numbers for numbers in found if "offloaded" in numbers]
    assert len(offloaded) >= 3
    for numbers in offloaded:
        assert torch.equal(numbers["offloaded"], numbers["score/policy/whole"])
        assert int(numbers["offloaded/freed"]) >= 97 * 48 * 4  # the tiny models' table, fp32


def test_experts_in_host_memory_give_the_same_numbers_and_free_the_card(output):
    found = load_file(output / "experts.safetensors")
    for name in ("logps", "gradient"):
        assert (
            torch.equal(found[f"in host memory/{name}"], found[f"on the card/{name}"])
            and found[f"on the card/{name}"].any()
        )
    freed = int(found["on the card/bytes"]) - int(found["in host memory/bytes"])
    assert freed >= int(found["on the card/stacks"].sum()) > 50_000


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cards_peak_is_that_of_the_live_bytes(output, dtype, phase):
    peaks = json.loads((output / "peaks.json").read_text())[dtype]
    card, counted, on_cpu = (peaks[way][phase] for way in ("card", "counted on the card", "counted on the CPU"))
    assert (
        counted / AGREES
        < card
        < counted * AGREES + (SCORES * AGREES if phase in ("score", "update, recomputed") else 0)
    )
    if phase in ("rollout", "score"):
        assert counted == pytest.approx(on_cpu, rel=AGREES - 1)
    else:
        width = {"float32": 4, "bfloat16": 2}[dtype]
        assert on_cpu <= counted * AGREES and counted <= on_cpu * AGREES + 5 * GATE * width
