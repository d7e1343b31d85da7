"""A token embedding in host memory: only the rows of a pass's tokens reach the device."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class HostEmbedding(nn.Module):
    """A frozen embedding whose table stays on the CPU; takes and returns tensors on the device of the ids.

    The table is no parameter of the model: nothing moves it, counts it or saves it.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._held: dict[str, Any] = {"embedding": embedding.to("cpu")}

    @property
    def weight(self) -> torch.Tensor:
        """The table (V, H), on the CPU."""
        return self._held["embedding"].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows (.., H) of ids (..)."""
        return self._held["embedding"](ids.to("cpu")).to(ids.device)


def movable_embeddings(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return a model's embeddings that only look tokens up, each with the module it lies in and its name there.

    Of tokens, and of tokens in each layer (Gemma 3n and 4); not one that is the output head as well, nor one that lies
    in host memory already.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    rows = embedding.weight.shape[0]
    return [
        (parent, name, module)
        for parent in model.modules()
        for name, module in parent.named_children()
        if isinstance(module, nn.Embedding)
        and module.weight.shape[0] >= rows
        and (head is None or module.weight is not head.weight)
    ]


def embeddings_to_host(model: PreTrainedModel) -> None:
    """Let a model's `movable_embeddings` lie in host memory.

    Raises:
        ValueError: there are none: its embedding is the output head as well.
    """
    found = movable_embeddings(model)
    if not found:
        raise ValueError("a token embedding that is the output head as well cannot leave the device")
    for parent, name, module in found:
        setattr(parent, name, HostEmbedding(module))
