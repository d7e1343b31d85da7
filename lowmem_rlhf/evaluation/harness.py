"""Tasks of EleutherAI's lm-eval on the live shared base, in any of its roles: no second copy of a model is loaded.

Answers to one context share its tokens in a packed row, so a task with several choices reads its question once. Not
supported are lm-eval's own batching and caching, and stopping at a string while sampling: the text is cut at the string
afterwards, which gives the same result.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lowmem_rlhf.architecture.stops import text_ids, written_text
from lowmem_rlhf.engine.ladder import RolloutLimits
from lowmem_rlhf.engine.logprobs import tiles
from lowmem_rlhf.engine.packing import Group, PackedBatch
from lowmem_rlhf.engine.passes import BatchLimits, micro_batches
from lowmem_rlhf.errors import UserError, one_line
from lowmem_rlhf.evaluation.target import EvalTarget
from lowmem_rlhf.inference.opening import memory_explained
from lowmem_rlhf.progress import message, reported_as
from lowmem_rlhf.rollout.sampling import Sampling
from lowmem_rlhf.suggest import did_you_mean
from lowmem_rlhf.training.intervals import Column, Estimate, Z, differences, estimates

POSITIONS = 2048  # where a model does not say how many it has; lm-eval's own default
MAX_GEN_TOKENS = 256  # likewise
BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means; lm-eval's 100,000 take minutes


class SharedBaseLM(TemplateLM):  # type: ignore[misc]
    """An `EvalTarget` in one role, as lm-eval sees a model."""

    def __init__(self, target: EvalTarget, role: str, name: str) -> None:
        super().__init__()
        self._target, self._role, self._name = target, role, name
        self._base = target.base
        self.tokenizer = target.base.tokenizer
        positions = getattr(target.base.model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = positions if isinstance(positions, int) else POSITIONS

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self._base.stop_ids) if self.tokenizer.eos_token_id is None else int(self.tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval keeps chats that the tokenizer wrote."""
        return self._base.model_id.replace("/", "__")

    @property
    def prefix_token_id(self) -> int:
        """The token that comes before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, with the tokenizer's start token unless the text has it; never with an end token."""
        bos = self.tokenizer.bos_token
        add = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        if add:
            return text_ids(self.tokenizer, string, self._base.stop_ids)
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return messages as the model's chat template writes them."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._target.recipe.data.chat_template_kwargs,
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return for each continuation of a context its log-prob and whether greedy decoding would produce it."""
        groups = self._grouped([(context, continuation) for _, context, continuation in requests])
        scores: dict[int, tuple[float, bool]] = dict.fromkeys(range(len(requests)), (0.0, True))

        def work(limits: BatchLimits) -> None:
            shown = reported_as(f"{self._name}, log-probs")
            for packed in micro_batches(self._base, groups, limits.micro_batch_tokens, shown):
                scores.update(self._scored(packed))

        with self._base.role(self._role):
            self._target.ladder.score(work, message)
        return [scores[row] for row in range(len(requests))]

    def _grouped(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Group]:
        """Return the continuations grouped by context; a context that leaves too little room loses its first tokens."""
        members: dict[tuple[int, ...], list[int]] = {}
        for row, (context, continuation) in enumerate(pairs):
            room = max(1, self.max_length + 1 - len(continuation))  # the last token is never fed
            if continuation:
                members.setdefault(tuple(context[-room:]), []).append(row)
        return [Group(list(context), [pairs[row][1] for row in rows], rows) for context, rows in members.items()]

    @torch.no_grad()
    def _scored(self, packed: PackedBatch) -> dict[int, tuple[float, bool]]:
        states = self._base.states(packed).index_select(0, packed.predict)  # (S, H)
        logps, greedy = [], []
        for tile in tiles(len(states), self._target.ladder.tile):
            every = torch.log_softmax(self._base.head.logits(states[tile]), dim=-1, dtype=torch.float32)  # (tile, V)
            targets = packed.targets[tile]
            logps.append(every.gather(-1, targets[:, None])[:, 0])
            greedy.append(every.argmax(dim=-1) == targets)
        sums = [float(one.double().sum()) for one in torch.cat(logps).split(packed.lengths)]
        likeliest = [bool(one.all()) for one in torch.cat(greedy).split(packed.lengths)]
        return dict(zip(packed.rows, zip(sums, likeliest, strict=True), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-prob of each whole text, in windows of the model's positions."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(window)) for window in cut]
            windows += own
            counts.append(len(own))
        values = iter(self._loglikelihood_tokens(windows))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to the first of its stop strings."""
        same: dict[tuple[int, float], list[int]] = {}
        for row, request in enumerate(requests):
            options = request.args[1]
            max_tokens = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_GEN_TOKENS)
            temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
            same.setdefault((max_tokens, temperature), []).append(row)
        texts = [""] * len(requests)
        for (max_tokens, temperature), rows in same.items():
            prompts = [self.tok_encode(requests[row].args[0])[-max(1, self.max_length - max_tokens) :] for row in rows]
            for row, text in zip(rows, self._sampled(prompts, max_tokens, temperature), strict=True):
                texts[row] = _cut(text, requests[row].args[1].get("until"))
        return texts

    def _sampled(self, prompts: Sequence[list[int]], most: int, temperature: float) -> list[str]:
        base, seed = self._base, self._target.recipe.training.seed

        def work(limits: RolloutLimits) -> list[str]:
            engine = self._target.engine
            shown = reported_as(f"{self._name}, answers")
            with base.role(self._role):
                engine.sync()
                groups = engine.generate(prompts, 1, most, Sampling(temperature), limits, seed, shown)
            return [written_text(base.tokenizer, one.ids, base.stop_ids) for [one] in groups]

        return self._target.ladder.rollout(work, message)


def run_tasks(target: EvalTarget, tasks: Sequence[str], limit: int | None = None, chat: bool = False) -> dict[str, Any]:
    """Return ``results``, ``difference`` and ``counts`` (see `run.evaluations`) of lm-eval's tasks for every role.

    A metric is named TASK/METRIC. A mean over the task's problems gets its interval from `intervals`, and a paired
    difference; any other metric gets an interval from lm-eval's standard error.

    Args:
        tasks: names, or YAML files with your own tasks.
        limit: take only so many problems of each task.
        chat: write the prompts with the model's chat template.

    Raises:
        UserError: there is no such task, its data cannot be had, or there is no chat template.
    """
    if chat and not target.base.tokenizer.chat_template:
        raise UserError(f"--chat: the tokenizer of {target.base.model_id!r} has no chat template; leave it out")
    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    names = [_task_name(Path(task)) if Path(task) in files else task for task in tasks]
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"--lm-eval {name}: lm-eval has no such task{did_you_mean(name, manager.all_tasks)}")
    results: dict[str, Any] = {}
    columns: list[dict[str, Column]] = []
    counts: dict[str, int] = {}
    for name, role in target.roles.items():
        try:
            with memory_explained(target.recipe):
                evaluated = simple_evaluate(
                    SharedBaseLM(target, role, name),
                    tasks=list(names),
                    task_manager=manager,
                    limit=limit,
                    bootstrap_iters=BOOTSTRAPS,
                    apply_chat_template=chat,
                )
        except OSError as error:  # what is not on the disk or cannot be reached
            reason = one_line(error)[:300]
            raise UserError(
                f"--lm-eval {','.join(tasks)}: the data of a task cannot be had ({reason}); it comes from the Hub, go "
                "online once or name a local file in a task's YAML"
            ) from error
        columns.append(_columns(evaluated))
        results[name] = {key: one.to_dict() for key, one in {**_reported(evaluated), **estimates(columns[-1])}.items()}
        counts = {f"{task} problem": len(rows) for task, rows in evaluated["samples"].items()}
    difference = {key: one.to_dict() for key, one in differences(*columns).items()} if len(columns) == 2 else {}
    return {"counts": counts, "results": results, **({"difference": difference} if difference else {})}


def _task_name(file: Path) -> str:
    try:
        name = next(
            line.partition(":")[2].strip().strip("\"'")  # lm-eval's own YAML has tags (!function) that stay unread here
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.startswith("task:")
        )
    except (OSError, UnicodeDecodeError, StopIteration) as error:
        raise UserError(
            f"--lm-eval {file}: it is no readable task file of lm-eval (a YAML with `task: NAME`)"
        ) from error
    return name


def _columns(evaluated: dict[str, Any]) -> dict[str, Column]:
    """Return the metrics that are means over problems."""
    columns = {}
    for task, metrics in evaluated["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            samples = evaluated["samples"].get(task, [])
            rows = [row for row in samples if not chosen or row.get("filter") in (chosen, None)]
            values = [row.get(metric) for row in rows]
            if not values or not all(isinstance(one, (int, float)) for one in values):
                continue
            numbers = np.asarray(values, dtype=np.float64)
            if isinstance(value, float) and abs(numbers.mean() - value) < 1e-6:
                share = bool(np.isin(numbers, (0.0, 1.0)).all())
                columns[_key(task, metric, chosen)] = Column(numbers, np.ones_like(numbers), share)
    return columns


def _reported(evaluated: dict[str, Any]) -> dict[str, Estimate]:
    """Return every metric as lm-eval reports it, with an interval from its standard error."""
    reported = {}
    for task, metrics in {**evaluated["results"], **evaluated.get("groups", {})}.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or not chosen:
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            half = Z * error if isinstance(error, (int, float)) else None
            bounds = (None, None) if half is None else (value - half, value + half)
            reported[_key(task, metric, chosen)] = Estimate(float(value), *bounds)
    return reported


def _key(task: str, metric: str, chosen: str) -> str:
    return f"{task}/{metric}" if chosen in ("", "none") else f"{task}/{metric} ({chosen})"


def _cut(text: str, until: Any) -> str:
    stops = [until] if isinstance(until, str) else list(until or [])
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
