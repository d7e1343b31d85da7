"""A role of the SharedBase under the face of a transformers model, as TRL's trainers call one.

TRL gets two such models for one base, the policy and the reference: entering a role costs nothing, so there is one copy
of the weights and no peft model whose adapters TRL would cast or copy. A padded batch comes in; its tokens go through
the base without padding, and a prompt that several rows share goes through once. Log-probs come from the package's
tiled head: logits exist in tiles, at the positions that are scored.

Shapes: R rows of L tokens, S scored tokens, H hidden size, V vocabulary.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lowmem_rlhf.engine.base import SharedBase
from lowmem_rlhf.engine.logprobs import tiled_logprobs
from lowmem_rlhf.engine.packing import Group, PackedBatch
from lowmem_rlhf.engine.roles import POLICY

IGNORED = -100  # the label of a token that is not scored


@dataclass(frozen=True)
class Row:
    """The tokens of one row without padding; the first ``scored_from`` are only read. It begins at column ``start``."""

    ids: list[int]
    scored_from: int
    start: int


class RoleModel(nn.Module):
    """What TRL takes for a causal LM.

    It has no parameters of its own: the policy's are the base's masters, and switching it to training or evaluation
    changes nothing in the base, whose layers keep the mode that quantized weights and recomputation need.

    Args:
        base: the shared base.
        role: the role it is in.
        tile: positions whose logits exist at once.
    """

    # for TRL, which would switch recomputation off and on its own way around the reference; the base has its own
    is_gradient_checkpointing = is_activation_checkpointing = False

    def __init__(self, base: SharedBase, role: str, tile: int) -> None:
        super().__init__()
        self._held = (base,)  # in a tuple, so that no mode or device of this module reaches the base
        self.role, self.tile = role, tile
        self.fed = 0  # tokens that went through the base with gradients
        self.config = copy.deepcopy(base.model.config)  # TRL writes into it
        self.generation_config = copy.deepcopy(getattr(base.model, "generation_config", None)) or SimpleNamespace()

    @property
    def base(self) -> SharedBase:
        """The shared base."""
        return self._held[0]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what trains in this role: the masters of the policy, of the reference nothing."""
        yield from self.base.trainable().items() if self.role == POLICY else ()

    def get_output_embeddings(self) -> nn.Module:
        """Return the base's output head."""
        return self.base.head.module

    def add_model_tags(self, tags: Any) -> None:
        """Take what TRL writes into model cards; the run's card is the package's."""

    def keep_own_forward(self) -> None:
        """Take away the forward that TRL's trainers put into their models in their constructor."""
        self.__dict__.pop("forward", None)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        fused_lm_head: bool = False,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """Run a padded batch in this role.

        Args:
            input_ids, attention_mask: (R, L), padded on either side.
            labels: (R, L), a token or -100 where nothing is scored; scored tokens are a row's last ones.
            fused_lm_head: return log-probs in place of logits.

        Returns:
            With ``fused_lm_head`` ``log_probs`` and ``entropy`` (R, L - 1), zero where nothing is scored, and zeros
            in place of what TRL only logs (``mean_logits``, ``is_top1``); else ``logits`` (R, L, V) fp32, zero at the
            last token of a row, which predicts none of the row's.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self.base.role(self.role):
            if fused_lm_head:
                assert labels is not None
                return self._scored(read_rows(input_ids, mask, labels), labels)
            return SimpleNamespace(logits=self._logits(read_rows(input_ids, mask, None), mask))

    def _scored(self, rows: list[Row], labels: torch.Tensor) -> SimpleNamespace:
        shape = (labels.shape[0], labels.shape[1] - 1)
        batch, states = self._states(rows)
        logps, entropies = tiled_logprobs(states, batch.targets, self.base.head, 1.0, self.tile)
        first = [rows[r].start + rows[r].scored_from - 1 for r in batch.rows]
        places = [
            r * shape[1] + f + t for r, f, n in zip(batch.rows, first, batch.lengths, strict=True) for t in range(n)
        ]
        index = torch.tensor(places, dtype=torch.long, device=logps.device)

        def spread(values: torch.Tensor) -> torch.Tensor:
            flat = torch.zeros(shape[0] * shape[1], dtype=torch.float32, device=values.device)
            return flat.index_copy(0, index, values).view(shape)

        nothing = torch.zeros(shape, dtype=torch.float32, device=logps.device)
        return SimpleNamespace(
            log_probs=spread(logps),
            entropy=spread(entropies),
            mean_logits=nothing,
            is_top1=nothing.bool(),
            aux_loss=None,
        )

    def _logits(self, rows: list[Row], mask: torch.Tensor) -> torch.Tensor:
        batch, states = self._states(rows)  # (S, H)
        length = mask.shape[1]
        places = [
            r * length + rows[r].start + t for r, n in zip(batch.rows, batch.lengths, strict=True) for t in range(n)
        ]
        index = torch.tensor(places, dtype=torch.long, device=states.device)
        whole = torch.zeros((mask.numel(), states.shape[1]), dtype=states.dtype, device=states.device)
        hidden = whole.index_copy(0, index, states).view(*mask.shape, -1)  # (R, L, H)
        return self.base.head.logits(hidden).float()

    def _states(self, rows: list[Row]) -> tuple[PackedBatch, torch.Tensor]:
        """Return the batch in the base's layout, and the hidden states (S, H) that predict the scored tokens."""
        prompts: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            prompts.setdefault(tuple(row.ids[: row.scored_from]), []).append(number)
        groups = [
            Group(prompt, [rows[r].ids[len(prompt) :] for r in found], found) for prompt, found in prompts.items()
        ]
        batch = self.base.layout.lay_out(groups, self.base.device)
        if torch.is_grad_enabled():
            self.fed += batch.input_ids.numel()
        return batch, self.base.states(batch).index_select(0, batch.predict)


def read_rows(input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> list[Row]:
    """Return the tokens of padded rows (R, L) without the padding; without labels all but the first are scored.

    Raises:
        ValueError: a row in which nothing is scored, or whose scored tokens are not its last ones.
    """
    rows = []
    wanted = [None] * len(input_ids) if labels is None else labels.tolist()
    for ids, seen, own in zip(input_ids.tolist(), mask.tolist(), wanted, strict=True):
        start = seen.index(1)
        tokens = ids[start : start + sum(seen)]
        scored = len(tokens) - 1 if own is None else sum(label != IGNORED for label in own)
        row = Row(tokens, len(tokens) - scored, start)
        if not 0 < scored < len(tokens) or (own and tokens[-scored:] != own[start + len(tokens) - scored :][:scored]):
            raise ValueError("scored tokens must be the last ones of a row, behind at least one that is only read")
        rows.append(row)
    return rows
