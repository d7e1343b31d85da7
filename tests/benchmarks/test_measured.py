"""The tables of docs/measured.md are those of the records, and a record of a card becomes rows of them."""

import json

import measured
import pytest

TITLES = (
    "Decoded tokens a second",
    "A GRPO step with NF4",
    "A step as it is planned",
    "The same step by",
    "The device",
)


def side(seconds: float) -> dict:
    phases = dict.fromkeys(("rollout", "score", "update", "step"), seconds)
    return {"seconds": phases, "peak_bytes": {"step": 2**30 * seconds}, "compute_dtype": "float16"}


@pytest.fixture
def record() -> dict:
    """Return a record of a card as `bench` writes one."""
    speed = {"graphs": 900.0, "without_graphs": 300.0, "waves": 450.0}
    decoded = {"tokens_per_second": speed, "ratio": {"without_graphs": 3.0, "waves": 2.0}}
    both = {"predicted": 8, "measured": 9, "ratio": 1.125}
    phases = dict.fromkeys(("rollout", "score", "update", "step"), both)
    values = {
        "graphs": {"rows": {"8": decoded}},
        "step": {
            "ours": side(1.0),
            "trl": side(4.0),
            "ratio": {"seconds": side(0.25)["seconds"], "peak_bytes": {"step": 0.25}},
        },
        "plan": {"settings": {"quantization": "none"}, "memory": phases, "time": None, "reserved": both},
        "precisions": {"nf4": side(1.0), "none": side(0.5)},
        "device_tests": {"passed": 5, "failed": 1, "skipped": 0, "failures": ["a"], "finished": False},
    }
    parts = {name: {"title": name, "status": "done", "seconds": 1.0, "values": one} for name, one in values.items()}
    parts["device_tests"] |= {"status": "failed", "reason": "a | b"}
    device = {"name": "NVIDIA Tesla T4", "source": "nvml", "total_bytes": 15 * 2**30, "driver": "550.1", "cores": 2}
    return {
        **{"schema": 1, "kind": "bench", "date": "2026-01-02T03:04:05Z", "device": device, "package": "0.1.0"},
        **{"versions": {"torch": "2.13.0", "trl": None}, "commit": "abc1234", "parts": parts},
        "work": {"prompts": 2, "generations": 8, "completion_length": 128},
        "model": {"name": "Qwen/Qwen2.5-0.5B-Instruct", "weights": "random", "compute_dtype": "float16"},
    }


def test_the_page_is_what_the_records_say():
    measured.main(["--check"])


def test_a_stale_page_is_an_error_and_is_written_anew(tmp_path, monkeypatch):
    page = tmp_path / "measured.md"
    page.write_text(measured.PAGE.read_text(encoding="utf-8").replace("| what | result |", "| what | result! |"))
    monkeypatch.setattr(measured, "PAGE", page)
    with pytest.raises(SystemExit, match=r"run `python benchmarks/measured\.py`"):
        measured.main(["--check"])
    measured.main([])
    measured.main(["--check"])


def test_a_card_s_record_is_a_row_of_every_table(record):
    text = measured.sections([record])["bench-gpu"]
    assert all(f"\n{title}" in text for title in TITLES)
    assert "| Tesla T4, 2026-01-02 | 15.0 GiB, driver 550.1 |" in text and "| abc1234 |" in text
    assert "| 2 x 8 x 128 |" in text
    assert "| Tesla T4, 2026-01-02 | 8 | 900 | 300 | 450 | 3.00 |" in text
    assert "| 1.0 s / 4.0 s | 0.25 | 0.25 | 0.25 | 0.25 | 1.00 GiB / 4.00 GiB | 0.250 |" in text
    assert "| none | 1.125 | 1.125 | 1.125 | 1.125 | 1.125 | - | - | - | - |" in text
    assert "| float16 | 0.50 s |" in text and "| 5 | 1 | 0 | those that the time sufficed for |" in text
    assert "| device_tests | failed | a / b |" in text


def test_what_was_not_measured_has_no_table(record):
    for part in record["parts"].values():
        part["values"] = {}
    text = measured.sections([record])["bench-gpu"]
    assert not any(title in text for title in TITLES) and "Tesla T4" in text
    assert measured.sections([])["bench-gpu"].startswith("No card has been measured")


def test_a_file_that_is_no_record_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(SystemExit, match=r"a\.json is no record"):
        measured.read_records(tmp_path)


def test_kept_records_name_no_folder_of_a_machine():
    for path in measured.RECORDS.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not any(folder in text for folder in ("/home/", "/root/", "/tmp/", "/Users/", "/work/", "C:\\")), path
