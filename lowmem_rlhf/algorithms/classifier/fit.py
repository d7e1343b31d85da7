"""Fine-tune a sequence classifier (BERT and the like) on labelled texts, for the `classifier` reward to judge with.

All weights train in fp32 with a cross-entropy loss, the model's own dropout and a fresh head. A step has a fixed number
of texts and is split by padded tokens; its loss is the mean over its texts, however it is split. Left out: mixed
precision, class weights, keeping the best of the evaluations.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lowmem_rlhf.data.examples import classes_of
from lowmem_rlhf.engine.whole import in_body
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.files import begin_folder, check_room, delete, finish_folder, writing
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.progress import message
from lowmem_rlhf.recipe.sections import LearnedReward, TrainingConfig
from lowmem_rlhf.rewards.encoder import Encoder, batches_by_tokens, load_encoder
from lowmem_rlhf.training.health import HealthWatch
from lowmem_rlhf.training.intervals import Column, bounds
from lowmem_rlhf.training.learning import LostTokens, Parts, no_gradient, sums, unchanged, warm_up_remark
from lowmem_rlhf.training.optimizer import Optimizer

LabelledTexts = tuple[Sequence[str], Sequence[str]]  # N texts, the label of each


@dataclass(frozen=True)
class ClassifierReport:
    """What became of a training.

    Attributes:
        labels: the classes, in the order of the logits.
        losses: the loss of every step.
        held_out: ``loss``, ``accuracy``, and ``accuracy/LABEL`` on the texts of each class, and their ``intervals``;
            empty without such texts.
    """

    labels: list[str]
    losses: list[float]
    held_out: dict[str, Any]


Progress = Callable[[int, int, float], None]
Measure = Callable[[], dict[str, Any]]
After = Callable[[int, Measure], bool]


def train_classifier(
    train: LabelledTexts,
    output: Path,
    start: LearnedReward,
    training: TrainingConfig,
    epochs: int = 3,
    held_out: LabelledTexts = ((), ()),
    progress: Progress = lambda step, steps, loss: None,
    after: After = lambda step, measure: False,
) -> ClassifierReport:
    """Train a classifier and write it, with its tokenizer, into a new folder.

    Args:
        train: texts with their labels; the classes are the labels, sorted.
        output: the folder, which the reward's option `model` then names.
        start: the model to start from, and how it reads; its head, if it has one, is replaced.
        training: learning rate, schedule, seed, and as ``prompts_per_step`` the texts of a step.
        epochs: how often each text is seen.
        held_out: labelled texts to measure the result on.
        progress: called after every step with its number, the number of steps and its loss.
        after: called then with its number and what measures the held-out texts now; training ends where it is True.

    Raises:
        UserError: the texts cannot be learned from, the model cannot be loaded, or the folder is taken.
        RunError: numbers were not finite, nothing was learned, or memory ran out.
    """
    labels = _check(train, held_out, output)
    torch.manual_seed(training.seed)
    encoder = _load(start, labels)
    encoder.to("cpu" if start.device == "auto" else detect(start.device).torch_device)

    def measure() -> dict[str, Any]:
        encoder.model.eval()
        return _measure(encoder, held_out, labels) if held_out[0] else {}

    def goes_on(step: int, steps: int, loss: float) -> bool:
        progress(step, steps, loss)
        ended = after(step, measure)
        encoder.model.train()
        return not ended

    losses = _train(encoder, encoder.tokens(train[0]), _indices(train, labels), training, epochs, goes_on)
    report = ClassifierReport(labels, losses, measure())
    with writing(output):
        check_room(output, sum(p.numel() * p.element_size() for p in encoder.model.parameters()))
        folder = begin_folder(output)
        try:
            encoder.model.save_pretrained(folder)
            encoder.tokenizer.save_pretrained(folder)
            finish_folder(output)
        except BaseException:
            delete(folder)
            raise
    return report


def _check(train: LabelledTexts, held_out: LabelledTexts, output: Path) -> list[str]:
    """Return the classes."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} is taken; choose another folder for the classifier")
    for name, (texts, given) in (("training", train), ("held-out", held_out)):
        if len(texts) != len(given):
            raise UserError(f"{name} data: got {len(texts)} texts and {len(given)} labels; give each text one label")
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            raise UserError(f"{name} data: text {empty[0] + 1} is empty; leave such rows out")
    return classes_of(train[1], held_out[1])


def _load(start: LearnedReward, labels: list[str]) -> Encoder:
    """Return the model with a fresh head for the labels, ready to be trained whole."""
    from transformers import AutoModelForSequenceClassification

    if start.dtype != "float32":
        raise UserError(f"dtype: got {start.dtype!r}; a classifier is trained in float32")
    encoder = load_encoder(
        AutoModelForSequenceClassification,
        start,
        "start",
        "encoder that a classifier can be made of",
        may_lack=lambda key, model: not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key,
        may_hold=lambda key, model: not in_body(key, model),
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    encoder.model.requires_grad_(True).train()
    return encoder


def _indices(data: LabelledTexts, labels: list[str]) -> list[int]:
    index = {label: number for number, label in enumerate(labels)}
    return [index[label] for label in data[1]]


def _train(
    encoder: Encoder,
    ids: list[list[int]],
    targets: list[int],
    training: TrainingConfig,
    epochs: int,
    goes_on: Callable[[int, int, float], bool],
) -> list[float]:
    """Train on tokenized texts until all steps are done or one does not go on; return the loss of every step."""
    size = training.prompts_per_step
    steps = epochs * math.ceil(len(ids) / size)
    parameters = dict(encoder.model.named_parameters())
    optimizer = Optimizer(parameters, training, "adamw", steps, encoder.model.device, scale_loss=False)
    parts, before = _parts(encoder, parameters), None
    watch = HealthWatch(len(encoder.tokenizer), training.max_grad_norm)
    losses: list[float] = []
    if remark := warm_up_remark(training, steps):
        message(remark)
    for rows in _rows_of_steps(len(ids), size, epochs, training.seed):
        optimizer.at_step, rate, skipped = len(losses) + 1, optimizer.learning_rate, optimizer.skipped
        start = sums(parts) if before is None else before
        losses.append(_gradient(encoder, optimizer, [ids[row] for row in rows], [targets[row] for row in rows]))
        norm = optimizer.step(losses[-1])
        optimizer.check_weights()
        if before is None and rate and optimizer.skipped == skipped:
            before = start
            if sentence := unchanged(before, sums(parts), {"grad_norm": norm}):
                raise RunError(sentence)
        metrics = {"step": len(losses), "loss": losses[-1], "grad_norm": norm, "learning_rate": rate}
        for sentence in [*optimizer.say(), *watch.observe(metrics)]:
            message(sentence)
        if not goes_on(len(losses), steps, losses[-1]):
            break
    if before is None:
        lost = LostTokens(training, optimizer)
        lost.add(len(ids), left_out=optimizer.skipped > 0)
        raise RunError(lost.why())
    if summary := watch.summary():
        message(summary)
    return losses


def _rows_of_steps(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Yield the texts of each step: every text once an epoch, in an order of its own."""
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        for first in range(0, count, size):
            yield order[first : first + size]


def _parts(encoder: Encoder, parameters: dict[str, torch.nn.Parameter]) -> Parts:
    """Return the weights of the body and of the head that train."""
    body = f"{encoder.model.base_model_prefix}."
    return {
        "body": [p for name, p in parameters.items() if name.startswith(body) and p.requires_grad],
        "head": [p for name, p in parameters.items() if not name.startswith(body) and p.requires_grad],
    }


def _gradient(encoder: Encoder, optimizer: Optimizer, ids: list[list[int]], targets: list[int]) -> float:
    """Leave the gradient of the mean loss over the texts in the parameters; return the loss."""

    def work(batch_tokens: int) -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches_by_tokens([len(one) for one in ids], batch_tokens):
            output, _ = encoder.forward([ids[row] for row in batch])
            wanted = torch.tensor([targets[row] for row in batch], dtype=torch.long, device=encoder.model.device)
            loss = F.cross_entropy(output.logits.float(), wanted, reduction="sum") / len(ids)
            loss.backward()
            total += float(loss.detach())
        return total

    longest = max(len(one) for one in ids)
    try:
        return encoder.within_memory(work, longest, "batch_tokens", print)
    except RuntimeError as error:
        if (sentence := no_gradient(error)) is not None:
            raise RunError(sentence) from error
        raise


def _measure(encoder: Encoder, held_out: LabelledTexts, labels: list[str]) -> dict[str, Any]:
    """Return loss and accuracy, the accuracy of each class as well, and the intervals of all of them."""
    logits = encoder.read(held_out[0], lambda output, mask: output.logits)  # (N, C)
    targets = torch.tensor(_indices(held_out, labels), dtype=torch.long, device="cpu")
    right = (logits.argmax(dim=-1) == targets).float()
    losses = F.cross_entropy(logits, targets, reduction="none").double().numpy()
    there = [(index, label) for index, label in enumerate(labels) if bool((targets == index).any())]
    columns = {"loss": Column(losses, np.ones_like(losses)), "accuracy": _share(right)}
    columns |= {f"accuracy/{label}": _share(right[targets == index]) for index, label in there}
    return {
        "loss": float(F.cross_entropy(logits, targets)),
        "accuracy": float(right.mean()),
        **{f"accuracy/{label}": float(right[targets == index].mean()) for index, label in there},
        "intervals": bounds(columns),
    }


def _share(right: torch.Tensor) -> Column:
    values = right.double().numpy()
    return Column(values, np.ones_like(values), share=True)
