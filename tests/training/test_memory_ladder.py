"""When the device's memory runs out: once more, then halve the size, and one clear sentence at the least size."""

import weakref
from functools import partial

import pytest
import torch
from training_cases import CPU

from lowmem_rlhf.engine.ladder import PATIENCE, Ladder, RolloutLimits, Saving
from lowmem_rlhf.engine.passes import BatchLimits
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.hardware.memory import retry_with_smaller


class Card:
    """Work that fits up to a size."""

    def __init__(self, fits: int) -> None:
        self.fits, self.sizes = fits, []

    def __call__(self, size: int) -> str:
        self.sizes.append(size)
        if size > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        return f"done with {size}"


def climb(fits: int, size: int, least: int):
    card, said = Card(fits), []
    try:
        return retry_with_smaller(card, size, least, "hardware.x", CPU, said.append), card.sizes, said
    except RunError as error:
        return error, card.sizes, said


def test_work_that_fits_is_done_once_and_nothing_is_said():
    assert climb(10, 10, 1) == (("done with 10", 10), [10], [])


def test_the_size_is_halved_until_it_fits():
    result, sizes, said = climb(3, 20, 1)
    assert (result, sizes) == (("done with 2", 2), [20, 10, 5, 2])
    assert said[0] == "the device's memory ran out with hardware.x=20; going on with 10"
    assert len(said) == 3


def test_the_least_size_is_tried_and_is_the_last():
    assert climb(64, 100, 64)[:2] == (("done with 64", 64), [100, 64])
    error, sizes, _ = climb(63, 100, 64)
    assert isinstance(error, RunError)
    assert "ran out even with hardware.x=64" in str(error)
    assert sizes == [100, 64, 64]  # another program may have had the memory for a moment only


def test_a_size_pinned_below_the_least_is_not_raised():
    assert climb(10, 8, 64)[:2] == (("done with 8", 8), [8])
    error, sizes, _ = climb(4, 8, 64)
    assert isinstance(error, RunError)
    assert sizes == [8, 8]


def test_other_errors_pass():
    def work(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        retry_with_smaller(work, 8, 1, "hardware.x", CPU, print)


# The ladder of a run


def fits_up_to(most: int, size_of):
    """Return work that is done with limits of a size, and the sizes that it was asked with."""
    sizes = []

    def work(limits):
        sizes.append(size_of(limits))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("out of memory")
        return limits

    return work, sizes


def a_ladder() -> Ladder:
    sizes = {"micro_batch_tokens": 200, "score_batch_tokens": 800, "logits_tile_tokens": 32}
    return Ladder(CPU, rollout_batch_size=16, temperature=0.7, **sizes)


def test_each_kind_of_work_has_its_size_and_keeps_the_one_that_fitted():
    ladder, said = a_ladder(), []
    (update, updates), (score, scores) = (fits_up_to(100, lambda limits: limits.micro_batch_tokens) for _ in range(2))
    rollout, rollouts = fits_up_to(4, lambda limits: limits.rows)
    for _ in range(2):
        assert ladder.update(update, said.append) == BatchLimits(0.7, 100, 32)
        assert ladder.score(score, said.append) == BatchLimits(0.7, 100, 32)
        assert ladder.rollout(rollout, said.append) == RolloutLimits(4, 200, 32)
    # the first failure of each phase is answered with the same size
    assert (updates, scores, rollouts) == ([200, 200, 100, 100], [800, 800, 400, 200, 100, 100], [16, 16, 8, 4, 4])
    assert ladder.changed == {"micro_batch_tokens": 100, "score_batch_tokens": 100, "rollout_batch_size": 4}
    repeated = [line for line in said if line.endswith("phase; trying once more")]
    assert [line.split()[-5] for line in repeated] == ["update", "scoring", "rollout"]
    assert [line.partition("; ")[0].rpartition(" ")[2] for line in said if line not in repeated] == [
        "hardware.micro_batch_tokens=200",
        *(f"hardware.score_batch_tokens={size}" for size in (800, 400, 200)),
        *(f"hardware.rollout_batch_size={size}" for size in (16, 8)),
    ]


def test_an_allocation_that_fails_once_changes_no_size():
    ladder, said = a_ladder(), []
    failures = iter([torch.OutOfMemoryError("out of memory"), MemoryError(), None, None])

    def work(limits):
        if error := next(failures):
            raise error
        return limits.micro_batch_tokens

    with pytest.raises(StopIteration):
        assert ladder.update(work, said.append) == 100  # the second failure in a row halves
        assert ladder.update(work, said.append) == 100
        ladder.update(work, said.append)
    assert len(said) == 2 and ladder.failures == 2


def test_what_saves_memory_at_a_price_comes_after_the_sizes_and_stays():
    ladder, said, done = a_ladder(), [], []
    for key, phase in {"rollout_weights": "rollout", "gradient_checkpointing": "update"}.items():
        ladder.savings.append(Saving(frozenset({phase}), key, True, partial(done.append, key)))

    def work(limits):
        if "gradient_checkpointing" not in done:
            raise torch.OutOfMemoryError("out of memory")
        return limits.micro_batch_tokens

    assert ladder.update(work, said.append) == 64
    assert done == ["gradient_checkpointing"] and [one.key for one in ladder.savings] == ["rollout_weights"]
    assert said[-1].endswith("ran out in the update phase; going on with hardware.gradient_checkpointing=true")
    assert ladder.changed == {"micro_batch_tokens": 64, "gradient_checkpointing": True}


def test_a_resumed_run_begins_with_what_it_had_come_down_to():
    ladder, done = a_ladder(), []
    ladder.savings.append(Saving(frozenset({"update"}), "gradient_checkpointing", True, partial(done.append, 1)))
    changed = {"micro_batch_tokens": 64, "rollout_batch_size": 100, "gradient_checkpointing": True}
    ladder.lower(changed)
    assert ladder.changed == {"micro_batch_tokens": 64, "gradient_checkpointing": True} and done == [1]


def test_sizes_grow_again_after_quiet_steps_and_more_slowly_after_each_failure():
    ladder, fits = a_ladder(), 50

    def work(limits):
        if limits.rows > fits:
            raise torch.OutOfMemoryError("out of memory")
        return limits.rows

    def steps_until_it_grows() -> int:
        return next(step for step in range(1, 10_000) if ladder.step_finished())

    fits = 4
    assert ladder.rollout(work, print) == 4
    assert steps_until_it_grows() == PATIENCE and ladder.rollout_batch_size == 8
    assert ladder.rollout(work, print) == 4  # it is still too much
    assert steps_until_it_grows() == 2 * PATIENCE
    fits = 50  # the game is over
    assert ladder.rollout(work, print) == 8
    assert steps_until_it_grows() == 2 * PATIENCE and ladder.rollout(work, print) == 16
    assert ladder.changed == {} and not any(ladder.step_finished() for _ in range(1000))


def test_work_without_a_size_is_tried_again_and_ends_with_what_would_help():
    ladder, calls = a_ladder(), []
    ladder.explain = lambda phase: f"the {phase} phase needs another card"

    def work():
        calls.append(1)
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RunError) as caught:
        ladder.survive("loading", work, print, sizes=False)
    assert str(caught.value) == "the device's memory ran out in the loading phase; the loading phase needs another card"
    assert len(calls) == 3 and ladder.changed == {}


def test_an_explanation_that_fails_hides_nothing():
    ladder = a_ladder()
    ladder.explain = lambda phase: {}[phase]
    with pytest.raises(RunError, match=r"ran out in the loading phase; close other programs that use it"):
        ladder.survive("loading", partial(fits_up_to(-1, int)[0], 0), print, sizes=False)


def test_a_failed_try_holds_no_memory_when_the_next_one_begins():
    alive = []

    class Large:
        pass

    def work(size: int) -> str:
        alive[:] = [one for one in alive if one() is not None]
        if size > 1:
            large = Large()
            alive.append(weakref.ref(large))
            raise torch.OutOfMemoryError("out of memory")
        return f"{len(alive)} of before are alive"

    assert retry_with_smaller(work, 4, 1, "hardware.x", CPU, print) == ("0 of before are alive", 1)


def test_a_rollout_may_shrink_to_one_completion_and_passes_to_the_least_tokens():
    ladder = a_ladder()
    with pytest.raises(RunError, match=r"ran out in the rollout phase even with hardware\.rollout_batch_size=1;"):
        ladder.rollout(fits_up_to(0, lambda limits: limits.rows)[0], print)
    with pytest.raises(RunError, match=r"ran out in the update phase even with hardware\.micro_batch_tokens=64;"):
        ladder.update(fits_up_to(63, lambda limits: limits.micro_batch_tokens)[0], print)


def test_an_end_for_want_of_memory_is_worded_once_and_whatever_explains_it():
    def fails(phase):
        raise ValueError("no plan can be made")

    ladder = a_ladder()
    ladder.explain = lambda phase: f"take less in {phase}"
    assert ladder.ran_out("update") == "the device's memory ran out in the update phase; take less in update"
    assert "even with hardware.micro_batch_tokens=" in ladder.ran_out("update", sizes=True)
    ladder.explain = fails
    sentence = ladder.ran_out("update")
    assert sentence.startswith("the device's memory ran out in the update phase; ") and "no plan" not in sentence
