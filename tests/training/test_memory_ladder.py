"""When the device's memory runs out: halve the size, go on, and give up with one clear sentence at the least size."""

import pytest
import torch
from training_cases import CPU

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
    assert sizes == [100, 64]


def test_a_size_pinned_below_the_least_is_not_raised():
    assert climb(10, 8, 64)[:2] == (("done with 8", 8), [8])
    error, sizes, _ = climb(4, 8, 64)
    assert isinstance(error, RunError)
    assert sizes == [8]


def test_other_errors_pass():
    def work(size: int) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        retry_with_smaller(work, 8, 1, "hardware.x", CPU, print)
