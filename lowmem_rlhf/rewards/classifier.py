"""A learned reward: how sure a sequence classifier (BERT and the like) is that a completion is of one class."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lowmem_rlhf.errors import UserError
from lowmem_rlhf.recipe.sections import ClassifierReward
from lowmem_rlhf.rewards.encoder import Encoder, load_encoder
from lowmem_rlhf.rewards.functions import Completion, completion_text
from lowmem_rlhf.suggest import did_you_mean


def load_classifier(options: ClassifierReward) -> "Classifier":
    """Load the classifier on the CPU.

    Raises:
        UserError: see `load_encoder`; the label is missing or unknown, or the model gives no probabilities.
    """
    from transformers import AutoModelForSequenceClassification

    keep = "start" if options.text == "completion" else "end"
    return Classifier(load_encoder(AutoModelForSequenceClassification, options, keep, "sequence classifier"), options)


class Classifier:
    """A reward with TRL's signature. A text that occurs several times is read once.

    An empty completion (nothing but white space) has probability 0. As `logit` or `log_probability`, which have no
    lowest value, it gets what the model says of the empty text.
    """

    columns: tuple[str, ...] = ()  # of the data, that it needs

    def __init__(self, encoder: Encoder, options: ClassifierReward) -> None:
        self.encoder, self.output, self.text = encoder, options.output, options.text
        config = encoder.model.config
        self.index = label_index(options.label, config.id2label, options.model)
        # one logit, or labels that do not exclude each other: transformers' text-classification pipeline does the same
        self.independent = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        if config.problem_type == "regression" and options.output != "logit":
            raise UserError(
                f"output: got {options.output!r}, but model {options.model!r} is a regression, which has no "
                "probabilities; take output=logit"
            )

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Return the output for each completion."""
        own = [completion_text(completion) for completion in completions]
        whole = self.text == "prompt_and_completion"
        template = whole and any(isinstance(p, list) for p in prompts) and self.encoder.tokenizer.chat_template
        texts = [self._joined(p, c) for p, c in zip(prompts, completions, strict=True)] if whole else own
        unique = list(dict.fromkeys(texts))
        logits = self.encoder.read(unique, lambda output, mask: output.logits, special=not template)
        value = dict(zip(unique, self._values(logits), strict=True))
        if self.output == "probability":
            return [value[text] if one.strip() else 0.0 for text, one in zip(texts, own, strict=True)]
        return [value[text] for text in texts]

    def _joined(self, prompt: Any, completion: Completion) -> str:
        """Return prompt and completion as one text: by the classifier's chat template if it has one."""
        if isinstance(prompt, str):
            return prompt + completion_text(completion)
        messages = [*prompt, *(completion if isinstance(completion, list) else [])]
        if self.encoder.tokenizer.chat_template:
            return str(self.encoder.tokenizer.apply_chat_template(messages, tokenize=False))
        return completion_text(messages)

    def _values(self, logits: torch.Tensor) -> list[float]:
        """Return what is asked for of (N, C) logits."""
        if not len(logits):
            return []
        if self.output == "probability":
            logits = logits.sigmoid() if self.independent else logits.softmax(dim=-1)
        elif self.output == "log_probability":
            logits = F.logsigmoid(logits) if self.independent else logits.log_softmax(dim=-1)
        return [float(value) for value in logits[:, self.index]]


def label_index(label: int | str | None, names: dict[int, str], model: str) -> int:
    """Return the index of a class given by name or index.

    Raises:
        UserError: none is given and there are several, or there is no such class.
    """
    known = ", ".join(f"{index} {name!r}" for index, name in sorted(names.items()))
    if label is None and len(names) == 1:
        return 0
    if label is None:
        raise UserError(f"label: missing; the labels of model {model!r} are {known}")
    if label in names:
        return int(label)
    places = [index for index, name in names.items() if name == label]
    if not places:
        raise UserError(
            f"label: got {label!r}; the labels of model {model!r} are {known}{did_you_mean(str(label), names.values())}"
        )
    return places[0]
