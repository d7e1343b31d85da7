"""What the live view takes of a run: the CPU time of a frame, of a finished step, and of telling it how far a phase is.

Usage: python benchmarks/live_view.py
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "display"))

from fake_run import PLAN, Clock, events, metrics, terminal

from lowmem_rlhf.display.live import FRAMES_A_SECOND, LiveView


def seconds(work: Callable[[], object], times: int) -> float:
    """Return the CPU seconds of this thread for one call."""
    began = time.thread_time()
    for _ in range(times):
        work()
    return (time.thread_time() - began) / times


def main() -> None:
    """Print a line for each width of a terminal."""
    for width in (80, 200):
        clock = Clock()
        with LiveView(60, 0, terminal(width, 50), PLAN, clock) as view:
            for _ in events(view, clock, total=20):
                pass
            assert view._live is not None
            frame = seconds(view._live.refresh, 300)
            step = seconds(lambda: view.step(metrics(20)), 300)
            phase = seconds(lambda: view.phase("rollout", 3, 64), 100_000)
        share = FRAMES_A_SECOND * frame
        print(
            f"{width} columns: a frame {1e3 * frame:.2f} ms, {FRAMES_A_SECOND} a second: {share:.2%} of one core; a "
            f"finished step {1e3 * step:.2f} ms; a phase told {1e6 * phase:.2f} µs",
            file=sys.__stdout__,
        )


if __name__ == "__main__":
    main()
