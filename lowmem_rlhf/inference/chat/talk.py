"""A conversation between a user and the roles of a base: prompts as in training, replies sampled token by token.

Several prompts are not batched.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.architecture.vocabulary import check_ids
from lowmem_rlhf.data.bad_rows import RowReport
from lowmem_rlhf.data.chat_template import is_chat
from lowmem_rlhf.data.messages import Message
from lowmem_rlhf.data.prompt_writer import PromptWriter
from lowmem_rlhf.data.row_template import fill_template, template_fields
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.bounds import LEAST_TEMPERATURE, MOST_TEMPERATURE, SEEDS
from lowmem_rlhf.recipe.schema import Recipe
from lowmem_rlhf.recipe.sections import DataConfig

if TYPE_CHECKING:
    from lowmem_rlhf.engine.base import SharedBase

POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True)
class ChatOptions:
    """How to answer.

    Attributes:
        compare: the reference answers too.
        max_tokens: of an answer; None: as many as in training.
        temperature: 0 takes the likeliest token; else top-p, top-k and min-p are the recipe's. The repetition penalty,
            the least length and stop strings always are.
        seed: of the first answer; each later one takes the next number.
        task: of several, the one whose prompts are written; None: the first.
    """

    compare: bool = False
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int = 0
    task: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: logits cannot be divided by the temperature, or torch takes no such seed.
        """
        check_temperature(self.temperature)
        if not 0 <= self.seed <= SEEDS:
            raise UserError(f"--seed: got {self.seed}; it should be from 0 to {SEEDS}")


def check_temperature(temperature: float) -> None:
    """Check a temperature that an answer is drawn at.

    Raises:
        UserError: it is neither 0 nor one that logits can be divided by.
    """
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
        raise UserError(
            f"temperature: got {temperature}; it should be 0 (the likeliest token), or from {LEAST_TEMPERATURE:g} to "
            f"{MOST_TEMPERATURE:g}"
        )


class Prompts:
    """Makes prompts of what a user types, as training makes them of rows."""

    def __init__(self, data: DataConfig, tokenizer: Any, stop_ids: frozenset[int] = frozenset()) -> None:
        # examples of data.text are plain text whatever the tokenizer has
        self.keeps_messages = data.text is None and is_chat(data, tokenizer)
        # a template of several columns is not filled: the user types the whole turn
        has_one_column = data.template is not None and len(template_fields(data.template)) == 1
        self.template = data.template if has_one_column else None
        own = DataConfig(
            train=data.train,
            prompt="prompt",
            answer=None,
            system=data.system,
            chat=self.keeps_messages,
            chat_template_kwargs=data.chat_template_kwargs,
        )
        shots = PromptWriter(data, tokenizer, stop_ids, RowReport(data)).shots if data.few_shot else ()
        self._writer = PromptWriter(own, tokenizer, stop_ids, RowReport(own), shots)

    def turn(self, text: str) -> str:
        """Return the user's text, put into the recipe's template."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half characters of a command line in another encoding
        if self.template is None:
            return text
        return fill_template(self.template, dict.fromkeys(template_fields(self.template), text))

    def ids(self, turn: str, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a turn after earlier messages; a plain model sees the turn alone.

        Raises:
            UserError: the chat template refuses the messages, or nothing is left to read of them.
        """
        row = Row({"prompt": turn}, 1)
        self._writer.check_text(turn, "prompt", row.number)
        prompt = self._writer.prompt(
            row, [*messages, {"role": "user", "content": turn}] if self.keeps_messages else turn
        )
        (ids,) = self._writer.prompt_ids([prompt])
        self._writer.check_end(ids)
        return ids


class TextStream:
    """Decodes tokens as they come; characters of several tokens appear once they are whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that one more token completes; may be empty."""
        self._ids.append(token)
        return self._more(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))  # the beginning of a character

    def rest(self) -> str:
        """Return what was held back, at the end."""
        return self._more(self._text())

    def _text(self) -> str:
        # Tags that are special tokens are a part of the answer. Cleaning up would change text that was shown already.
        return self._tokenizer.decode(self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _more(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def room_for(base: "SharedBase", model: str, ids: Sequence[int], most: int, remedy: str = "shorten it") -> int:
    """Return how many tokens may follow a prompt: ``most``, or as many as the model has positions for.

    Raises:
        UserError: the prompt leaves no room.
    """
    positions = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return most
    if len(ids) >= positions:
        raise UserError(f"the prompt has {len(ids)} tokens, but {model!r} has only {positions} positions; {remedy}")
    return min(most, positions - len(ids))


class Reply:
    """One role's answer; `pieces` draws it.

    Attributes:
        text, tokens: what has been drawn so far; without the stop token.
        prompt_tokens: length of the prompt.
    """

    def __init__(self, role: str, prompt_tokens: int, drawn: Iterator[int], tokenizer: Any) -> None:
        self.role, self.prompt_tokens, self._drawn, self._tokenizer = role, prompt_tokens, drawn, tokenizer
        self.text, self.tokens = "", 0

    def pieces(self) -> Iterator[str]:
        """Yield the new text of each token, empty where it completes no character."""
        decoded = TextStream(self._tokenizer)
        for token in self._drawn:
            self.tokens += 1
            piece = decoded.add(token)
            self.text += piece
            yield piece
        rest = decoded.rest()
        self.text += rest
        yield rest


class Talk:
    """A conversation. Each role remembers what it answered itself; plain models remember nothing."""

    def __init__(self, base: "SharedBase", recipe: Recipe, options: ChatOptions) -> None:
        from lowmem_rlhf.rollout.sampling import Sampling

        self.base, self.roles = base, [REFERENCE, POLICY] if options.compare else [POLICY]
        self.prompts = Prompts(recipe.data, base.tokenizer, base.stop_ids)
        g = recipe.generation
        self._sampling = Sampling.of(g, options.temperature)
        self._max_tokens = options.max_tokens or g.max_completion_length
        self._seed = options.seed
        self._model = recipe.model
        self._messages: dict[str, list[Message]] = {role: [] for role in self.roles}

    def ask(self, text: str) -> list[Reply]:
        """Return the roles' replies; their tokens are sampled when they are read.

        Raises:
            UserError: the text is empty, has a token that the model has no row for, or the prompt leaves no room in
                the model's positions.
        """
        if not text.strip():
            raise UserError("the prompt is empty; give a text to answer")
        turn = self.prompts.turn(text)
        ids = {role: self.prompts.ids(turn, messages) for role, messages in self._messages.items()}
        check_ids(self.base.tokenizer, self.base.rows, ids.values())
        max_tokens = {role: self._room(prompt) for role, prompt in ids.items()}
        seed, self._seed = self._seed, self._seed + 1
        return [
            Reply(role, len(ids[role]), self._drawn(role, ids[role], max_tokens[role], seed), self.base.tokenizer)
            for role in self.roles
        ]

    def remember(self, text: str, replies: Sequence[Reply]) -> None:
        """Keep a turn and its answers for the next turns."""
        if self.prompts.keeps_messages:
            turn = {"role": "user", "content": self.prompts.turn(text)}
            for reply in replies:
                self._messages[reply.role] += [turn, {"role": "assistant", "content": reply.text}]

    def forget(self) -> None:
        """Begin a new conversation."""
        for messages in self._messages.values():
            messages.clear()

    def _room(self, ids: Sequence[int]) -> int:
        remedy = "forget the conversation with /reset" if any(self._messages.values()) else "shorten it"
        return room_for(self.base, self._model, ids, self._max_tokens, remedy)

    def _drawn(self, role: str, ids: list[int], max_tokens: int, seed: int) -> Iterator[int]:
        from lowmem_rlhf.rollout.stream import stream

        tokens = stream(self.base, ids, max_tokens, self._sampling, seed, tile=1)
        while True:
            with self.base.role(role):  # for one token only: another reply may be drawn between two
                token = next(tokens, None)
            if token is None:
                return
            yield token
