"""Whatever stops a run, a resume gives the adapter of the run that nothing stopped, bit for bit.

A sample; `make faults` stops runs at many more moments, and results/ has what came of it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowmem_rlhf import stopping
from lowmem_rlhf.stopping import SIGNALS, Stopped, check_stop, exit_code, stoppable

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def facts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not hasattr(os, "fork"):
        pytest.skip("runs are forks of one process")
    folder = tmp_path_factory.mktemp("stops")
    kinds = ["kills=1", "operations=1", "signals=2", "others=1", "steps=3"]
    done = subprocess.run(
        [sys.executable, str(HERE / "stops_process.py"), str(tiny_model), str(folder), "ppo", *kinds],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    file = folder / "ppo.json"
    assert file.is_file(), done.stderr[-3000:]
    return json.loads(file.read_text())


def rows_of(facts: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    rows = [row for row in facts["stops"] if row["kind"] in kinds]
    assert rows
    return rows


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(facts):
    for row in rows_of(facts, "kill", "operation", "signal"):
        assert (row["resumed"], row["sha256"]) == (0, facts["sha256"]), row
        assert row["steps"] == list(range(1, facts["steps"] + 1)), row
        assert row["checkpoints"] == 1, row


def test_a_signal_loses_no_finished_step_and_the_message_is_true(facts):
    for row in rows_of(facts, "signal"):
        assert row["right_code"] and not row["lost"], row
        assert row["kept"] == row["finished"], row
        assert row["said"] in (None, row["kept"]), row


def test_a_second_signal_ends_at_once_and_says_what_is_kept(facts):
    (row,) = rows_of(facts, "second signal")
    assert row["code"] == 128 + signal.SIGTERM and row["kept"] == 0
    assert "stopped by SIGTERM again; no step is kept, --resume starts over; " in row["log"]
    assert "lost" in row["log"].splitlines()[-1]


def test_a_reward_that_nothing_interrupts_ends_the_run_with_its_finished_steps(facts):
    (row,) = rows_of(facts, "stuck reward")
    assert (row["code"], row["finished"], row["kept"]) == (1, 1, 1), row
    assert "cannot be interrupted" in row["log"] and "step 1 is kept, --resume goes on from it" in row["log"]


def test_signals_that_were_ignored_at_the_start_stay_ignored(facts):
    (row,) = rows_of(facts, "ignored signals")
    assert (row["code"], row["finished"]) == (0, facts["steps"]), row


def test_a_closed_terminal_stops_a_run_like_any_signal(facts):
    (row,) = rows_of(facts, "closed terminal")
    assert row["code"] == 128 + signal.SIGHUP, row
    assert row["kept"] == row["finished"] >= 1, row


def test_handlers_are_as_before_after_the_block_and_other_code_cannot_swallow_a_signal():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(Stopped) as caught, stoppable():
        check_stop()
        with contextlib.suppress(BaseException):  # as a careless function does
            os.kill(os.getpid(), signal.SIGTERM)
        check_stop()
    assert exit_code(caught.value) == 143
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    check_stop()


def test_what_fails_because_of_a_signal_is_that_signal():
    with pytest.raises(Stopped), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise OSError(5, "the terminal is gone")


def test_ctrl_c_without_the_command_line_has_the_same_code():
    assert exit_code(KeyboardInterrupt()) == 130 and stopping.cause(KeyboardInterrupt()) == "interrupted"
