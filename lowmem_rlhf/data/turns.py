"""What follows a prompt: an answer as the chat template or plain text writes it, its tokens and the token that ends it.

Also conversations of which every answer is learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lowmem_rlhf.data.bad_rows import RowError
from lowmem_rlhf.data.conversations import places_learned
from lowmem_rlhf.data.messages import Message, has_weight
from lowmem_rlhf.data.prompt_writer import Prompt, PromptWriter
from lowmem_rlhf.data.rendered import is_written, squeezed
from lowmem_rlhf.data.values import Row
from lowmem_rlhf.errors import UserError

Part = tuple[Prompt, Message]  # a prompt with the answer that follows it
Segments = tuple[Prompt, list[str]]  # a prompt with what follows it, cut where the assistant begins to speak

_TWO_WAYS = (
    "the chat template writes earlier answers differently from the last one, so each is learned behind its own prompt, "
    "as an example of its own"
)
_MEET = (
    "prompt and answer in one piece have other tokens where they meet; learned are those behind the prompt's own "
    "tokens, which rollouts begin from"
)


_SEAM = 24  # characters on each side of where prompt and answer meet


class TurnWriter:
    """Writes answers behind prompts.

    Args:
        prompts: writes the prompts, and knows the tokens that end a completion.
    """

    def __init__(self, prompts: PromptWriter) -> None:
        self.prompts, self.stop_ids = prompts, prompts.stop_ids
        self._tokenizer, self._template = prompts.tokenizer, prompts.template

    def turn(self, prompt: Prompt, answer: Message) -> str:
        """Return the text of an answer as it follows its prompt.

        Raises:
            RowError: see `ChatTemplate.turn`.
        """
        if isinstance(prompt.prompt, str):
            content = str(answer["content"])
            return content if prompt.text[-1].isspace() or content[0].isspace() else "\n" + content
        assert self._template is not None
        made = self._template.turn(prompt.prompt, prompt.text, answer, prompt.tools)
        for note in made.notes:
            self.prompts.report.note(note, prompt.row.number)
        return made.text

    def turn_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that follow others, without the space that some tokenizers put in front."""
        tokenizer = self._tokenizer
        if not texts:
            return []
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        if not tokenizer.tokenize("=")[0].startswith("▁"):
            return ids
        # SentencePiece as in Llama 2: behind a newline, which merges with nothing, a text has no such space.
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        behind = tokenizer(["\n" + text for text in texts], add_special_tokens=False)["input_ids"]
        return [
            after[len(newline) :] if after[: len(newline)] == newline else alone
            for alone, after in zip(ids, behind, strict=True)
        ]

    def ended(self, ids: list[int]) -> list[int]:
        """Return an answer's ids with the one stop token that ends it.

        Raises:
            RowError: there is a stop token before its end.
        """
        if self._template is not None:
            ids = _without_tail(ids, self._tokenizer, self.stop_ids)
        ids = ended(ids, self._tokenizer, self.stop_ids)
        self._check_inside(ids[:-1])
        return ids

    def _check_inside(self, ids: Sequence[int]) -> None:
        if (stop := next((token for token in ids if token in self.stop_ids), None)) is not None:
            elsewhere = ", or set data.chat=false where the chat template writes it" if self._template else ""
            raise RowError(
                "a stop inside an answer",
                f"its answer holds {self._tokenizer.convert_ids_to_tokens(int(stop))} before its end, where the model "
                f"would stop; remove it{elsewhere}",
            )

    def conversation(self, row: Row, learn_all: bool) -> tuple[Segments | None, list[Part]]:
        """Return what is learned of a conversation: in one piece, or the prompts with the answers behind them.

        Args:
            learn_all: each of the assistant's messages, and not the last alone.

        Raises:
            RowError: it has no answer at its end, two in a row where all are learned, or the chat template refuses it.
        """
        messages, report = self.prompts.conversation(row, learn_all), self.prompts.report
        report.learn_all = learn_all
        answers = [one for one in messages if one["role"] == "assistant" and has_weight(one)]
        report.answers.append(len(answers))
        if not learn_all or len(answers) == 1:
            return None, [(self.prompts.prompt(row, messages[:-1]), messages[-1])]
        places = places_learned(messages, str(self.prompts.data.messages))
        parts = [(self.prompts.prompt(row, messages[:place]), messages[place]) for place in places]
        if (segments := self._segments(parts)) is not None:
            return (parts[0][0], segments), []
        report.note(_TWO_WAYS, row.number)
        return None, parts

    def _segments(self, parts: Sequence[Part]) -> list[str] | None:
        """Return what follows the first prompt, cut at the ends of the other prompts; None: they are not one text."""
        last, answer = parts[-1]
        text = last.text + self.turn(last, answer)
        ends = [len(prompt.text) for prompt, _ in parts]
        if not all(text.startswith(prompt.text) for prompt, _ in parts):
            return None
        segments = [text[start:end] for start, end in zip(ends, [*ends[1:], len(text)], strict=True)]
        if not all(is_written(one, segment) for segment, (_, one) in zip(segments, parts, strict=True)):
            return None
        ids = self.turn_ids(segments[:-1])
        return segments if all(self._ends(*one) for one in zip(ids, parts, parts[1:], strict=False)) else None

    def _ends(self, ids: Sequence[int], part: Part, after: Part) -> bool:
        """Return whether the tokens that follow an earlier prompt have a stop, and before it nothing but the answer.

        Where the stop is the mark of the user's turn (GLM-4), a message of another role may stand before it.
        """
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        if end is None or str(self._tokenizer.convert_ids_to_tokens(int(ids[end]))) in str(part[1]["content"]):
            return False
        text, content = squeezed(self._tokenizer.decode(ids[:end])), squeezed(str(part[1]["content"]))
        behind = text[text.find(content) + len(content) :]
        following = [one["content"] for one in after[0].prompt[len(part[0].prompt) + 1 :] if isinstance(one, dict)]
        return not any(squeezed(str(one)) in behind for one in following if str(one).strip())

    def learned_segments(
        self, prompt: Prompt, segments: Sequence[str]
    ) -> tuple[list[int], list[int], tuple[bool, ...]]:
        """Return the ids of a prompt and of what follows it, and which of these are learned: answers and their stops.

        Raises:
            RowError: the prompt has no tokens, or there is a stop token inside the last answer.
        """
        (prompt_ids,) = self.prompts.prompt_ids([prompt])
        self.prompts.check_end(prompt_ids)
        *earlier, last = self.turn_ids(segments)
        ids: list[int] = []
        learned: list[bool] = []
        for one in earlier:
            end = next(place for place, token in enumerate(one) if token in self.stop_ids) + 1
            ids += one
            learned += [True] * end + [False] * (len(one) - end)
        last = self.ended(last)
        return prompt_ids, ids + last, (*learned, *([True] * len(last)))

    def compare_seams(self, written: Sequence[tuple[Prompt, str]]) -> None:
        """Note the chats whose tokens are others where prompt and answer are tokenized in one piece.

        Only the seam can differ, so a few characters on both sides are looked at.
        """
        if self._template is None or not written:
            return
        rows: dict[tuple[str, str], list[int]] = {}
        for prompt, turn in written:
            rows.setdefault((prompt.text[-_SEAM:], turn[:_SEAM]), []).append(prompt.row.number)
        before = self._tokenizer([start for start, _ in rows], add_special_tokens=False)["input_ids"]
        behind = self.turn_ids([end for _, end in rows])
        whole = self._tokenizer([start + end for start, end in rows], add_special_tokens=False)["input_ids"]
        for numbers, first, second, both in zip(rows.values(), before, behind, whole, strict=True):
            if first + second != both:
                for number in numbers:
                    self.prompts.report.note(_MEET, number)


def seams(prompt: Prompt, segments: Sequence[str]) -> Iterator[tuple[Prompt, str]]:
    """Yield what stands before each segment that follows a prompt, and the segment."""
    text = prompt.text
    for segment in segments:
        yield replace(prompt, text=text), segment
        text += segment


def ended(ids: list[int], tokenizer: Any, stop_ids: frozenset[int]) -> list[int]:
    """Return the ids with the token that ends them, which they may have already.

    Raises:
        UserError: the tokenizer names none.
    """
    if ids and ids[-1] in stop_ids:
        return ids
    end = min(stop_ids, default=None) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "model: its tokenizer names no end-of-sequence token, so that no answer could end; take another model"
        )
    return [*ids, end]


def _without_tail(ids: list[int], tokenizer: Any, stop_ids: frozenset[int]) -> list[int]:
    """Cut a turn after its first stop token, or else its last special one, where only whitespace and others follow."""
    special = stop_ids.union(tokenizer.all_special_ids)
    start = len(ids)
    while start and (ids[start - 1] in special or not tokenizer.decode(ids[start - 1 : start]).strip()):
        start -= 1
    ends = [index + 1 for index in range(start, len(ids)) if ids[index] in special]
    stops = [end for end in ends if ids[end - 1] in stop_ids]
    return ids[: stops[0] if stops else ends[-1]] if ends else ids
