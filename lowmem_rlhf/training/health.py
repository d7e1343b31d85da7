"""A watch over a run's metrics: says in words when a policy collapses or no longer learns, and when it began.

Every sign is a condition on several steps, so that one odd batch says nothing. The thresholds are far outside of what
runs that learn show, since a false alarm is worse than a late one. What a run began with is its first step's row,
which is measured before any weight has changed. Signs of a ruined policy are serious: from the first of them on the run
is not healthy, whatever comes after. The others say that steps are wasted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

SERIOUS_STEPS = 3  # in a row: a batch may be odd, three are not, and later no checkpoint would be left to go back to
WASTED_STEPS = 10  # hard prompts come in runs of a few, and a wasted step does no harm
WITHOUT_SHARE = 0.8  # of these steps: one that had something to teach now and then does not make it a run that learns

KL_LIMIT = 5.0  # nats a token: the reference gives such tokens e^-5 = 0.7 % of the policy's probability; runs have < 1
ENTROPY_LEAST = 1e-3  # nats a token: every token is certain to 99.99 %; a policy that solved its task keeps 0.01
ENTROPY_MOST = 0.9  # of log(vocabulary), the entropy of tokens drawn blindly; where the run began below 0.8 of it
ENTROPY_BEGAN = 0.8
LENGTH_LEAST = 1.2  # mean tokens, the end token included: nearly all answers are empty; where they began with 4
LENGTH_BEGAN = 4.0
TRUNCATED_MOST = 0.99  # of the completions are cut; where at most half of them were at the beginning
TRUNCATED_BEGAN = 0.5
SAME_MOST = 0.95  # of a step's completions, to different prompts, are one text; where at most half began as one
SAME_BEGAN = 0.5
LOSS_FACTOR, LOSS_ADDED = 2.0, 1.0  # a loss above twice that of the beginning plus one nat unlearns what was known
CLIPPED_BY = 100.0  # gradient norms above so many times max_grad_norm: their size has lost its meaning
WITHOUT_SIGNAL = 0.8  # of a step's groups have equal rewards: four of five completions were sampled in vain

WATCHED = (
    *("step", "kl", "entropy", "loss", "grad_norm", "learning_rate", "reward/mean", "completion/mean_length"),
    *("completion/truncated", "completion/most_common", "groups/without_signal"),
)


@dataclass(frozen=True)
class Sign:
    """What the watch looks for.

    Attributes:
        name: of the kind, in a checkpoint.
        steps: how many it looks at.
        share: of them that have to show it.
        serious: whether the policy is ruined by it.
        shows: whether a step shows it, given its row and what the run began with.
        said: what was seen over these steps, for a sentence.
        remedy: what to do.
    """

    name: str
    steps: int
    serious: bool
    shows: Callable[[Row, Row], bool]
    said: Callable[[Sequence[Row]], str]
    remedy: str
    share: float = 1.0


class HealthWatch:
    """Watches the rows of metrics.jsonl.

    Args:
        vocabulary: entries of the model's vocabulary, V.
        max_grad_norm: to which gradients are clipped.
    """

    def __init__(self, vocabulary: int, max_grad_norm: float) -> None:
        self.signs = _signs(math.log(max(vocabulary, 2)), max_grad_norm)
        self._rows: list[Row] = []
        self._began: Row = {}
        self._flagged: dict[str, str] = {}  # by sign: what was said of it
        self.first_serious: int | None = None

    @property
    def healthy(self) -> bool:
        """Whether no sign of a ruined policy has been seen so far."""
        return self.first_serious is None

    def observe(self, metrics: dict[str, Any]) -> list[str]:
        """Take in a finished step's row; return a sentence for each sign that is new since it was last absent."""
        row = {key: float(metrics[key]) for key in WATCHED if _is_number(metrics.get(key))}
        self._rows, self._began = [*self._rows, row][-WASTED_STEPS:], {**row, **self._began}
        sentences = []
        for sign in self.signs:
            last = self._rows[-sign.steps :]
            shown, needed = sum(sign.shows(one, self._began) for one in last), sign.share * sign.steps
            if shown < needed / 2:
                self._flagged.pop(sign.name, None)
            elif shown >= needed and len(last) == sign.steps and sign.name not in self._flagged:
                self._flagged[sign.name] = sentence = _sentence(sign, last)
                sentences.append(sentence)
                if sign.serious and self.first_serious is None:
                    self.first_serious = int(last[0].get("step", 0))
        return sentences

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, fit for JSON."""
        return {
            "rows": list(self._rows),
            "began": dict(self._began),
            "flagged": dict(self._flagged),
            "first_serious": self.first_serious,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave; an empty one is a watch that has seen nothing."""
        self._rows, self._began = list(state.get("rows", ())), dict(state.get("began", {}))
        self._flagged, self.first_serious = dict(state.get("flagged", {})), state.get("first_serious")

    def summary(self) -> str:
        """Return what the last sentence of a run says of its health; empty where there is nothing to say."""
        if not self._flagged and self.healthy:
            return ""
        now = " ".join(self._flagged.values())
        if self.healthy:
            return f"the run ends with steps that taught little: {now}"
        text = f"the run was not healthy from step {self.first_serious} on, and its result is not to be trusted"
        return f"{text}: {now}" if now else f"{text}, though the signs of it have gone"


def _signs(blind: float, max_grad_norm: float) -> list[Sign]:
    """Return all signs; ``blind`` is the entropy of tokens drawn blindly, in nats."""
    far = CLIPPED_BY * max_grad_norm
    slower = "go back to an earlier checkpoint and lower training.learning_rate"
    return [
        Sign(
            "kl",
            SERIOUS_STEPS,
            True,
            lambda row, began: _sampled(row) and row.get("kl", 0.0) > KL_LIMIT,
            lambda rows: f"the KL divergence from the reference is {_range(rows, 'kl')} nats a token",
            f"{slower}, or raise grpo.beta or ppo.kl_coef",
        ),
        Sign(
            "entropy low",
            SERIOUS_STEPS,
            True,
            lambda row, began: _sampled(row) and row.get("entropy", 1.0) < ENTROPY_LEAST,
            lambda rows: f"the policy's entropy is {_range(rows, 'entropy')} nats a token, so it samples one text only",
            f"{slower}, or raise generation.temperature",
        ),
        Sign(
            "entropy high",
            SERIOUS_STEPS,
            True,
            lambda row, began: (
                row.get("entropy", 0.0) > ENTROPY_MOST * blind and began.get("entropy", blind) < ENTROPY_BEGAN * blind
            ),
            lambda rows: f"the policy's entropy is {_range(rows, 'entropy')} nats a token, near that of random tokens",
            slower,
        ),
        Sign(
            "short",
            SERIOUS_STEPS,
            True,
            lambda row, began: (
                row.get("completion/mean_length", LENGTH_BEGAN) <= LENGTH_LEAST
                and began.get("completion/mean_length", 0.0) >= LENGTH_BEGAN
            ),
            lambda rows: f"completions have {_range(rows, 'completion/mean_length')} tokens, so nearly all are empty",
            f"see in samples.jsonl whether the reward favours empty answers, {slower}",
        ),
        Sign(
            "truncated",
            SERIOUS_STEPS,
            True,
            lambda row, began: (
                row.get("completion/truncated", 0.0) >= TRUNCATED_MOST
                and began.get("completion/truncated", 1.0) <= TRUNCATED_BEGAN
            ),
            lambda rows: "all completions are cut at generation.max_completion_length, and at first they were not",
            f"see in samples.jsonl whether they are still texts; if not, {slower}, else raise the length",
        ),
        Sign(
            "same text",
            SERIOUS_STEPS,
            True,
            lambda row, began: (
                row.get("completion/most_common", 0.0) >= SAME_MOST
                and began.get("completion/most_common", 1.0) <= SAME_BEGAN
            ),
            lambda rows: (
                f"{_range(rows, 'completion/most_common', percent=True)} of the completions are the same text, "
                "whatever the prompt"
            ),
            f"see in samples.jsonl which text the reward favours so, {slower}",
        ),
        Sign(
            "loss",
            SERIOUS_STEPS,
            True,
            lambda row, began: (
                not _sampled(row) and row.get("loss", 0.0) > LOSS_FACTOR * abs(began.get("loss", math.inf)) + LOSS_ADDED
            ),
            lambda rows: f"the loss is {_range(rows, 'loss')}, far above that of the first steps",
            slower,
        ),
        Sign(
            "clipped",
            WASTED_STEPS,
            False,
            lambda row, began: row.get("grad_norm", 0.0) > far,
            lambda rows: (
                f"the gradient's norm is {_range(rows, 'grad_norm')}, over {CLIPPED_BY:g} times training.max_grad_norm"
            ),
            "look at the size of the rewards, and lower training.learning_rate or raise training.max_grad_norm",
        ),
        Sign(
            "no signal",
            WASTED_STEPS,
            False,
            lambda row, began: row.get("groups/without_signal", 0.0) >= WITHOUT_SIGNAL,
            lambda rows: (
                f"in nearly all groups (of a step {_range(rows, 'groups/without_signal', percent=True)}) the "
                f"completions had equal rewards, of {_range(rows, 'reward/mean')} in the mean, so they taught nothing"
            ),
            "where the rewards are low, take easier prompts, a finer reward or a larger generation.num_generations; "
            "where they are as high as they can be, the task is learned",
            WITHOUT_SHARE,
        ),
        Sign(
            "no gradient",
            WASTED_STEPS,
            False,
            lambda row, began: (
                row.get("grad_norm", 1.0) == 0.0 and row.get("groups/without_signal", 0.0) < WITHOUT_SIGNAL
            ),
            lambda rows: "the gradient was exactly 0, so that no weight changed",
            "look at the rewards and the loss of these steps; with float16, take hardware.compute_dtype=bfloat16",
        ),
    ]


def _sampled(row: Row) -> bool:
    return "completion/mean_length" in row


def _sentence(sign: Sign, rows: Sequence[Row]) -> str:
    first, last = (int(row.get("step", 0)) for row in (rows[0], rows[-1]))
    text = f"steps {first} to {last}: {sign.said(rows)}; {sign.remedy}"
    rate = max(row.get("learning_rate", 0.0) for row in rows)
    return f"{text} (it was {rate:g})." if sign.serious and "learning_rate" in sign.remedy else f"{text}."


def _range(rows: Sequence[Row], key: str, percent: bool = False) -> str:
    values = sorted(row[key] for row in rows if key in row)
    if not values:
        return "unknown"
    scale, unit = (100, " %") if percent else (1, "")
    low, high = (f"{value * scale:.3g}" for value in (values[0], values[-1]))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
