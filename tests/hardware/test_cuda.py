"""A process that sees a single card."""

import pytest

from lowmem_rlhf.hardware.cuda import alone, is_cuda


@pytest.mark.parametrize(
    ("device", "visible", "alone_visible"),
    [
        ("cuda:0", None, "0"),
        ("cuda:1", None, "1"),
        ("cuda:1", "2,3", "3"),
        ("cuda", "GPU-a,GPU-b", "GPU-a"),
        ("cuda:1", " 2 , 0", "0"),
    ],
)
def test_a_card_alone_is_the_first(device, visible, alone_visible):
    environment = {"A": "b", **({"CUDA_VISIBLE_DEVICES": visible} if visible else {})}
    assert alone(device, environment) == ("cuda:0", {"A": "b", "CUDA_VISIBLE_DEVICES": alone_visible})


def test_another_kind_is_left_as_it_is():
    assert alone("cpu", {"A": "b"}) == ("cpu", {"A": "b"}) and alone("xpu:1", {}) == ("xpu:1", {})
    assert is_cuda("cuda:3") and not is_cuda("xpu:3")
