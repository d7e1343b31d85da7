"""The live-byte counter against allocation patterns whose peak is known by hand."""

import gc

import pytest
import torch

from lowmem_rlhf.hardware.live_bytes import LiveBytes

KIB = 1024


def floats(kib: int, **options) -> torch.Tensor:
    return torch.zeros(kib * KIB // 4, **options)


def test_peak_and_current_follow_allocations_and_views_count_once():
    with LiveBytes(scan=False) as counter:
        a = floats(64)
        b = a.view(2, -1)[0]
        assert counter.current == 64 * KIB
        c = a + 1
        assert counter.current == 128 * KIB
        del a
        assert counter.current == 128 * KIB, "the view keeps the storage"
        del b
        assert counter.current == 64 * KIB
        assert counter.peak == 128 * KIB
        counter.reset_peak()
        assert counter.peak == 64 * KIB
        c.add_(1)
        assert counter.peak == 64 * KIB
    del c
    assert counter.current == 0, "a storage freed after the mode ended is noticed too"


def test_storages_that_were_there_are_found_once():
    before = LiveBytes()
    weight = torch.nn.Parameter(floats(256))
    counter = LiveBytes()
    assert counter.current - before.current == 256 * KIB
    counter.add(weight.data)
    with counter:
        weight.detach().view(-1, 2)
    assert counter.current - before.current == 256 * KIB


def test_what_the_collector_was_told_to_leave_alone_is_found_as_well():
    before = LiveBytes()
    weight = torch.nn.Parameter(floats(256))
    gc.freeze()
    assert LiveBytes().current - before.current == 256 * KIB == weight.untyped_storage().nbytes()


def test_frozen_garbage_is_freed_and_not_counted():
    class Circle:
        def __init__(self):
            self.itself, self.weight = self, floats(256)

    before, circle = LiveBytes(), Circle()
    gc.freeze()
    del circle
    assert LiveBytes().current == before.current


def test_resized_storage_counts_with_its_new_size():
    with LiveBytes(scan=False) as counter:
        a = floats(4)
        a.resize_(8 * KIB)
        assert counter.current == 32 * KIB


class Doubling(torch.autograd.Function):
    """Makes one temporary of the input's size in each direction."""

    @staticmethod
    def forward(ctx, x):
        return (x + x) * 1.0

    @staticmethod
    def backward(ctx, grad):
        return (grad + grad) * 1.0


def test_tensors_made_inside_custom_functions_and_the_backward_pass_are_seen():
    x = floats(64, requires_grad=True)
    with LiveBytes(scan=False) as counter:
        y = Doubling.apply(x)
        assert counter.peak == 3 * 64 * KIB  # x, the temporary, the result
        loss = y.sum()
        counter.reset_peak()
        loss.backward()
    # x and y, the expanded gradient (one number), the temporary and the result, which becomes x.grad
    assert counter.peak == pytest.approx(4 * 64 * KIB, abs=64)
    assert counter.current == pytest.approx(3 * 64 * KIB, abs=64)


def test_checkpointed_layers_hold_less_than_kept_ones():
    def peak(checkpoint: bool) -> int:
        x = floats(64, requires_grad=True)
        with LiveBytes(scan=False) as counter:
            y = x
            for _ in range(4):
                layer = lambda z: z.exp().sin().cos()  # noqa: E731
                y = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False) if checkpoint else layer(y)
            y.sum().backward()
        return counter.peak

    assert peak(True) < 0.8 * peak(False)


def test_kernels_of_bitsandbytes_are_looked_into():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(256, 256)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    with LiveBytes(scan=False) as counter:
        out = dequantize_4bit(packed, state)
        constants = state.absmax, state.code, state.state2.absmax, state.state2.code
        for constant in constants:
            counter.add(constant)
    held = sum(t.untyped_storage().nbytes() for t in (packed, out, state.offset, *constants))
    assert counter.current == pytest.approx(held, abs=8)
    assert out.shape == weight.shape


def test_an_operator_with_a_python_kernel_shows_its_temporaries():
    library = torch.library.Library("live_bytes_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: (x + x) * 1.0, "CPU")
    with LiveBytes(scan=False) as counter:
        x = floats(64)
        torch.ops.live_bytes_test.twice(x)
    assert counter.peak == 3 * 64 * KIB
