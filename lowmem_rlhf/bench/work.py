"""The work that is measured: prompts, a reward, the constants of training, and how much of it. No torch here."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lowmem_rlhf.hardware.device import Device

BETA, LEARNING_RATE, RANK, ALPHA = 0.04, 1e-5, 16, 32
PROBLEMS = (
    "A baker fills 7 trays with 12 rolls each and sells 59 of them. How many rolls are left?",
    "Mira reads 18 pages on Monday and twice as many on Tuesday. The book has 120 pages. How many are left to read?",
    "A train has 9 cars with 46 seats each, and 287 seats are taken. How many seats are free?",
    "Tom saves $15 a week for 8 weeks and then spends a third of it on a jacket. How much money does he still have?",
    "A garden has 14 rows of 6 tomato plants. Each plant gives 5 tomatoes. How many tomatoes are there in all?",
    "Lena cuts a rope of 84 metres into pieces of 6 metres and gives half of the pieces away. How many does she keep?",
    "A shop sells pens at $3 and notebooks at $4. What do 11 pens and 5 notebooks cost together?",
    "A tank holds 500 litres. It loses 12 litres an hour for 9 hours, then 60 litres are added. How much is in it?",
)


def hash_reward(text: str) -> float:
    """Return a number in [0, 1) that looks random and depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


@dataclass(frozen=True)
class Sizes:
    """How much work the parts are given.

    Attributes:
        model: the Hub id whose sizes are taken where no model is named.
        prompts, generations, completion_length: B, G and tokens of a GRPO step (parts ``step`` and ``precisions``).
        repeats: timed steps of each side, after one that is not timed.
        micro_batch_tokens, tile: packed tokens of a pass of our engine, and positions whose logits exist at once.
        dequantized: an NF4 base lends the rollout a copy of its weights that is not quantized.
        rows: completions that are decoded at once (part ``graphs``), one figure for each.
        decoded_tokens: of each of these completions.
        plan_prompts, plan_prompt_length, plan_completion_length: of the planned step (part ``plan``).
    """

    model: str
    prompts: int
    generations: int
    completion_length: int
    repeats: int
    micro_batch_tokens: int
    tile: int
    dequantized: bool
    rows: tuple[int, ...]
    decoded_tokens: int
    plan_prompts: int
    plan_prompt_length: int
    plan_completion_length: int


ON_A_CARD = Sizes("Qwen/Qwen2.5-0.5B-Instruct", 2, 8, 128, 2, 4096, 512, True, (1, 8, 32), 128, 4, 256, 256)
ON_A_CPU = Sizes("HuggingFaceTB/SmolLM2-135M-Instruct", 1, 4, 24, 1, 1280, 32, False, (1, 8), 24, 2, 64, 32)


@dataclass(frozen=True)
class Work:
    """What a part's process is told.

    Attributes:
        device: torch's device string.
        compute_dtype: what the device computes in: its 16-bit dtype, or float32 on a CPU without products in bfloat16.
        int8_dtype: what int8 weights compute in.
        sizes: how much there is to do.
        model: what is loaded, as in a recipe; a Hub id where ``prepare`` has not chosen yet.
        named: whether the user has named it, so that it may be fetched.
        folder: where a part may write.
        seconds: how long it may take.
    """

    device: str
    compute_dtype: str
    int8_dtype: str
    sizes: Sizes
    model: str
    named: bool = False
    folder: str = ""
    seconds: float = 600.0

    @classmethod
    def on(cls, device: Device, sizes: Sizes, model: str | None = None) -> "Work":
        """Return the work for a device, with the model that the user names, or None."""
        slow = device.on_cpu and not device.avx512_bf16  # bfloat16 is 40 times as slow as float32 there
        dtypes = ("float32", "float32") if slow else (device.half_dtype, device.int8_dtype)
        return cls(device.torch_device, *dtypes, sizes, model or sizes.model, model is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Work":
        """Return the work that `to_dict` described."""
        sizes = Sizes(**{**values["sizes"], "rows": tuple(values["sizes"]["rows"])})
        return cls(**{**values, "sizes": sizes})
