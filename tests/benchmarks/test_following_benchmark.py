"""benchmarks/following.py: what a bounded rank loses, on factors whose products are small enough to be dense."""

import following
import pytest
import torch


def drawn(seed: int) -> following.Factors:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 9), (8, 5)]
    return [(torch.randn((2, i), generator=generator), torch.randn((o, 2), generator=generator)) for i, o in shapes]


def test_norms_and_shares_are_those_of_the_dense_products():
    first, second = drawn(0), drawn(1)
    exact, none = following.mixed(following.mixed(None, first, 0.6, None)[0], second, 0.6, None)
    dense = [0.4 * 0.6 * d @ c + 0.6 * b @ a for (a, b), (c, d) in zip(second, first, strict=True)]
    assert none == 0 and [len(a) for a, _ in exact] == [4, 4]
    assert following.norm(exact) == pytest.approx(float(torch.cat([one.flatten() for one in dense]).norm()))
    bounded, lost = following.mixed(following.mixed(None, first, 0.6, 2)[0], second, 0.6, 2)
    apart = [(torch.cat([a, c]), torch.cat([b, -d], dim=1)) for (a, b), (c, d) in zip(exact, bounded, strict=True)]
    assert 0 < lost == pytest.approx(following.norm(apart) / following.norm(exact), rel=1e-4)
