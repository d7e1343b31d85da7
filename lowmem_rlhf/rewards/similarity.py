"""A learned reward: cosine similarity of a completion's sentence embedding to that of a reference answer.

Embeddings are those of sentence-transformers (Reimers and Gurevych, arXiv 1908.10084): token embeddings pooled as the
model's own files say, by the mean without them. Its normalisation makes no difference to a cosine.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lowmem_rlhf.data.values import is_missing, text_of
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import SimilarityReward
from lowmem_rlhf.rewards.encoder import Encoder, load_encoder
from lowmem_rlhf.rewards.functions import Completion, completion_text

POOLINGS = ("mean", "cls", "max")
_OLD_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def load_similarity(options: SimilarityReward) -> "Similarity":
    """Load the embedding model on the CPU.

    Raises:
        UserError: see `load_encoder`; or the model makes its embeddings in a way that is not known here.
    """
    from transformers import AutoModel

    from lowmem_rlhf.architecture.source import resolve_model

    read = ModelFiles(resolve_model(options.model), options.revision)
    encoder = load_encoder(
        AutoModel, options, "start", "sentence encoder", may_lack=lambda key, model: key.startswith("pooler.")
    )
    if encoder.model.config.is_encoder_decoder:
        raise UserError(f"model {options.model!r} is no sentence encoder: it is an encoder with a decoder")
    own = read("sentence_bert_config.json")
    if options.max_length is None and own.get("max_seq_length"):
        encoder.max_length = min(own["max_seq_length"], encoder.max_length or own["max_seq_length"])
    return Similarity(encoder, pooling(read, options.model), bool(own.get("do_lower_case")), options.column)


class Similarity:
    """A reward with TRL's signature. A text that occurs several times is read once.

    An empty completion (nothing but white space) has similarity 0; a row without a reference answer has none.
    """

    def __init__(self, encoder: Encoder, pooling: str, lower: bool, column: str) -> None:
        self.encoder, self.pooling, self.lower, self.column = encoder, pooling, lower, column
        self.columns = (column,)

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Return the similarity of each completion to the reference answer in its row, -1 to 1."""
        own = [completion_text(completion).strip() for completion in completions]
        references = ["" if is_missing(one) else text_of(one).strip() for one in columns[self.column]]
        pairs = list(zip(own, references, strict=True))
        unique = list(dict.fromkeys(text for pair in pairs if all(pair) for text in pair))
        vector = dict(zip(unique, self.embed(unique), strict=True))
        return [
            None if not reference else float(vector[text] @ vector[reference]) if text else 0.0
            for text, reference in pairs
        ]

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of length 1 of N texts, (N, H) fp32 on the CPU."""
        texts = [text.lower() for text in texts] if self.lower else texts
        return self.encoder.read(texts, lambda output, mask: pooled(output.last_hidden_state, mask, self.pooling))


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return one vector of length 1 for each text, (B, H) fp32.

    Args:
        hidden: (B, T, H) token embeddings.
        mask: (B, T) 1 for a token, 0 for padding, which stands at the end.
        pooling: ``mean``, ``max``, or ``cls``: the first token's embedding.
    """
    hidden = hidden.float()
    weights = mask.unsqueeze(-1)  # (B, T, 1)
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "max":
        vectors = hidden.masked_fill(weights == 0, -torch.inf).amax(dim=1)
    else:
        vectors = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    return F.normalize(vectors, dim=-1)


class ModelFiles:
    """Reads the JSON files of a model that may or may not be there, from a folder or the Hub."""

    def __init__(self, path: str, revision: str | None) -> None:
        self.path, self.revision = path, revision

    def __call__(self, name: str) -> Any:
        """Return the content of a file, an empty object when there is none."""
        from transformers.utils import cached_file

        file = cached_file(
            self.path,
            name,
            revision=self.revision,
            _raise_exceptions_for_gated_repo=False,  # the weights will say it
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        try:
            return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        except ValueError as error:
            raise UserError(f"model {self.path!r}: its {name} is not JSON ({error})") from error


def pooling(read: ModelFiles, model: str) -> str:
    """Return how a model's token embeddings become one: what its sentence-transformers files say, else the mean.

    Raises:
        UserError: it has layers beyond the pooling, or pools in a way that is not known here.
    """
    modules = read("modules.json") or []
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    if other := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UserError(f"model {model!r} has a layer {other[0]} after its encoder, which is not known here")
    folders = [module["path"] for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    settings = read(f"{folders[0] if folders else '1_Pooling'}/config.json")
    named = settings.get("pooling_mode") or [mode for key, mode in _OLD_KEYS.items() if settings.get(key)] or ["mean"]
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(f"model {model!r} pools by {' and '.join(modes)}; known are {', '.join(POOLINGS)}")
    return str(modes[0])
