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


def embeddings_to_host(model: PreTrainedModel) -> None:
    """Let a model's token embedding lie in host memory.

    Raises:
        ValueError: the embedding is the output head as well.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ValueError("a token embedding that is the output head as well cannot leave the device")
    model.set_input_embeddings(HostEmbedding(embedding))
