"""Token ids against rows: a model may have rows without a token, a tokenizer tokens without a row. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Any

from lowmem_rlhf.errors import UserError

_NAMED = 3  # tokens in a message


def token_ids(tokenizer: Any) -> set[int]:
    """Return the ids that a tokenizer gives; empty where it does not tell."""
    if not hasattr(tokenizer, "get_vocab"):
        return set()
    return {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def missing_rows(tokenizer: Any, rows: int, stops: Iterable[int] = ()) -> list[int]:
    """Return the rows, of so many, that have no token, ascending: padding at the end and holes.

    Args:
        rows: of the output head, or of an embedding.
        stops: ids that end a text, which are not missing whatever the tokenizer knows of them.
    """
    known = token_ids(tokenizer)
    known = known.union(stops) if known else set(range(rows))
    return [row for row in range(rows) if row not in known]


def check_ids(tokenizer: Any, rows: int, ids: Iterable[Sequence[int]]) -> None:
    """Check that texts use no token that the embedding has no row for.

    A tokenizer may have such tokens (Gemma 3's has one) as long as none is used.

    Args:
        rows: of the embedding.
        ids: token ids of each text.

    Raises:
        UserError: one does; the message names the tokens.
    """
    used = {index for one in ids for index in one if index >= rows}
    if not used:
        return
    names = [str(tokenizer.convert_ids_to_tokens(index)) for index in sorted(used)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    size = max([*token_ids(tokenizer), *used]) + 1
    raise UserError(
        f"the tokenizer has {size:,} tokens, the embedding {rows:,} rows: the texts use {', '.join(names[:_NAMED])}"
        f"{more}, for which there is no row; enlarge the model's embedding (resize_token_embeddings) and save it with "
        "this tokenizer, take the tokenizer that the model was trained with, or write these texts otherwise"
    )
