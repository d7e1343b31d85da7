"""The most that a number of a recipe can be: generous, and still what memory, clocks and float32 can hold."""

from typing import Annotated

from pydantic import AfterValidator, Field

MOST_STEPS = 10**9  # optimizer steps, saves, epochs: a step takes milliseconds at least, so this is weeks
MOST_ROWS = 10**9  # of data
MOST_SECONDS = 10**7  # of one call, months
MOST_TOKENS = 10**7  # of one text; no model reads longer ones
MOST_IN_A_PASS = 10**9  # tokens or texts that are computed at once
MOST_PROMPTS = 10**6  # of a step
MOST_COMPLETIONS = 10**4  # of a prompt
MOST_EPOCHS = 10**4  # over the same rollouts
MOST_LAYERS = 10**4
MOST_RANK = 2**16  # of an adapter: above the width of any model
# learning rate and weight decay: AdamW moves a weight by about the rate, and shrinks it by rate * decay
MOST_RATE = 1.0
MOST_STOP_LENGTH = 1000  # characters of a text that ends a completion
LEAST_PENALTY, MOST_PENALTY = 1e-2, 1e2  # a factor of logits, which stay finite in float32 and are still told apart
MOST_COEFFICIENT = 1e6  # of a term in a sum, or a bound of a clip: what it multiplies stays finite in float32
SEEDS = 2**32 - 1  # the largest that NumPy and transformers take

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e3  # logits divided by less overflow; by more, all tokens are alike


def _greedy_or_warm(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise ValueError(f"got {value!r}; it should be 0 (the likeliest token) or at least {LEAST_TEMPERATURE:g}")
    return value


Temperature = Annotated[float, Field(ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)]
TemperatureOrGreedy = Annotated[float, Field(ge=0, le=MOST_TEMPERATURE), AfterValidator(_greedy_or_warm)]
