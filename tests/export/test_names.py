"""Which stored tensor is which parameter."""

from lowmem_rlhf.export.merging.names import stored_names

PARAMETERS = ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "lm_head.weight"]


def test_a_prefix_may_be_missing_or_added():
    stored = ["h.0.attn.c_attn.weight", "model.transformer.wte.weight", "lm_head.weight"]
    assert stored_names(PARAMETERS, stored) == dict(zip(stored, PARAMETERS, strict=True))


def test_a_name_that_fits_nothing_or_several_is_left_out():
    assert stored_names(PARAMETERS, ["h.0.attn.bias", "weight", "h.1.attn.c_attn.weight"]) == {}


def test_two_tensors_never_become_one_parameter():
    assert stored_names(PARAMETERS, ["wte.weight", "a.transformer.wte.weight"]) == {}
    assert stored_names(PARAMETERS, ["wte.weight", PARAMETERS[1]]) == {PARAMETERS[1]: PARAMETERS[1]}
