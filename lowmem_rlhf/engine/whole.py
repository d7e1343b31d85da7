"""Whether a model has got all of its weights from its files, and the files hold no others: otherwise it is refused.

Weights that are no numbers, or layers of zeros alone, are refused too (`weights`).

transformers fills a tensor that is missing or of another shape with random numbers and says so in a log that nobody
reads; of quantized layers it does not look at the shape at all.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_rlhf.architecture.weight_files import check_weight_files
from lowmem_rlhf.engine.weights import SHOWN, before_quantization, broken_weights, few
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.hardware.memory import is_out_of_memory

Exempt = Callable[[str, Any], bool]  # a tensor's name and the model -> whether it does not matter
Shape = tuple[int, ...]

# what older versions of transformers stored beside the weights: made anew from the configuration, never read
_OLD_BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|causal_mask|attn\.bias|attn\.attention\.bias)$")
_REMEDY = (
    "every tensor that its configuration asks for must be there and no other, tied ones aside: fetch the model again, "
    "or take the configuration that belongs to these weights"
)


def _never(key: str, model: Any) -> bool:
    return False


_RAN_OUT = "(out of memory)"  # among the names of tensors that could not be made


def load_whole(
    auto: Any,
    path: Any,
    name: str,
    kind: str = "",
    may_lack: Exempt = _never,
    may_hold: Exempt = _never,
    wider: str = "hardware.compute_dtype=bfloat16 and another quantization",
    **settings: Any,
) -> Any:
    """Return what ``auto.from_pretrained`` loads, every tensor of which came from the files.

    Args:
        auto: one of transformers' auto classes.
        path: a folder or a Hub id.
        name: the model's, for messages.
        kind: what the model is to be, for the message about a tensor that it lacks.
        may_lack: which tensors may be missing or of another shape, and begin at random.
        may_hold: which tensors the files may hold beyond the model's.
        wider: what to set where float16 is too narrow for the weights.
        settings: more for ``from_pretrained``.

    Raises:
        UserError: a tensor is missing, is one too many, has another shape, or is no weight.
        OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError: as ``from_pretrained``.
    """
    if "gguf_file" not in settings and Path(path).is_dir():
        check_weight_files(Path(path), name)
    with _unconverted() as unconverted, before_quantization() as quantized:
        try:
            model, loading = auto.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
        except RuntimeError as error:
            if _RAN_OUT in unconverted or quantized.ran_out:
                raise torch.OutOfMemoryError(f"out of memory while {name!r} was loaded") from error
            if unconverted and not is_out_of_memory(error):
                what = f"model {name!r}: of its files {few(unconverted)} cannot be made"
                raise UserError(
                    f"{what}, a tensor that belongs to it is missing or has another shape; {_REMEDY}"
                ) from error
            raise
    other = {key: (tuple(is_there), tuple(wanted)) for key, is_there, wanted in loading["mismatched_keys"]}
    other |= _other_shapes(model)
    absent = {key for key in {*loading["missing_keys"]} if not may_lack(key, model)}
    beyond = {key for key in loading["unexpected_keys"] if not _OLD_BUFFER.search(key) and not may_hold(key, model)}
    if misfit := difference(absent, beyond, {key: shapes for key, shapes in other.items() if not may_lack(key, model)}):
        whose = f"model {name!r} is no {kind}" if kind and absent else f"model {name!r} does not fit its configuration"
        raise UserError(f"{whose}: its files {misfit}; {_REMEDY}")
    if unusable := broken_weights(model, quantized):
        int8 = getattr(settings.get("quantization_config"), "load_in_8bit", False)
        half = settings.get("dtype") == torch.float16 or int8
        remedy = f"; float16{', in which int8 is made,' if int8 else ''} has no number above 65504" if half else ""
        remedy += f": where the files have, take {wider}" if half else ""
        raise UserError(
            f"model {name!r} has {unusable}: nothing can be computed with such weights; fetch the model again, or take "
            f"another one{remedy}"
        )
    return model


def difference(absent: set[str], beyond: set[str], other: Mapping[str, tuple[Shape, Shape]]) -> str:
    """Return in words which tensors are missing, too many or of another shape (is, should be); empty: none."""
    shapes = [f"{key}: {is_there} in place of {wanted}" for key, (is_there, wanted) in other.items()]
    parts = [
        f"lack {few(absent)}" if absent else "",
        f"hold {few(beyond)}, which it has no place for" if beyond else "",
        f"hold {len(other)} of another shape ({'; '.join(sorted(shapes)[:SHOWN])})" if other else "",
    ]
    return " and ".join(part for part in parts if part)


def differing_tensors(have: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """Return the `difference` between the tensors of a file and those that are wanted; empty: none."""
    common = have.keys() & wanted.keys()
    shapes = {key: (tuple(have[key].shape), tuple(wanted[key].shape)) for key in common}
    other = {key: (is_there, should_be) for key, (is_there, should_be) in shapes.items() if is_there != should_be}
    return difference({*wanted} - {*have}, {*have} - {*wanted}, other)


def in_body(key: str, model: Any) -> bool:
    """Say whether a tensor that has no place in a model lies in its body, beside those that have, not in a head."""
    prefix = model.base_model_prefix
    body = getattr(model, prefix, model)
    return key.removeprefix(f"{prefix}.").split(".")[0] in dict(body.named_children())


def _other_shapes(model: nn.Module) -> dict[str, tuple[Shape, Shape]]:
    """Return linear layers and stacks of experts, quantized ones too, whose weight has not the layer's shape."""
    others: dict[str, tuple[Shape, Shape]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and torch.is_tensor(weight):
            is_there = tuple((getattr(weight, "quant_state", None) or weight).shape)
            wanted = (module.out_features, module.in_features)
            if is_there != wanted:
                others[f"{name}.weight"] = (is_there, wanted)
        for stack, wanted in getattr(module, "stack_shapes", {}).items():  # what `Nf4WithExperts` was to fill
            is_there = tuple((getattr(getattr(module, stack), "quant_state", None) or getattr(module, stack)).shape)
            if is_there != wanted:
                others[f"{name}.{stack}"] = (is_there, wanted)
    return others


@contextmanager
def _unconverted() -> Iterator[list[str]]:
    """Collect the tensors that transformers could not make of several of a file (experts): it only logs their names."""
    names: list[str] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            names.extend(re.findall(r"(?m)^(\S.*?) *\| .*CONVERSION", text))
            if is_out_of_memory(RuntimeError(text)):
                names.append(_RAN_OUT)

    logger, reader = logging.getLogger("transformers.modeling_utils"), Reader()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(reader)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield names
    finally:
        logger.removeHandler(reader)
        logger.setLevel(level)
        logger.propagate = propagate
