"""Whether the policy that samples is the one that trains: how far their log-probs may be apart.

The difference of log-probs between sampling and the training pass is rounding alone where both run the same policy. How
large it then is was measured: over 42 architectures with tiny weights of realistic size, and on SmolLM2-135M
(docs/engine.md). One that is beyond is named, and one that is far beyond ends the run: what is learned from such
samples is not what the loss says.
"""

from collections.abc import Callable

from lowmem_rlhf.errors import RunError

# Mean absolute difference in nats a token, at temperature 1. In float32 it mostly is 1e-5; where a model picks keys or
# experts by a threshold, a rounding may tip one, and it was up to 2e-3.
EXPECTED = {"float32": 2e-4, "float16": 6e-3, "bfloat16": 5e-2}
# A server has kernels, and it may have weights, of its own: what bfloat16 leaves here is little for two programs.
EXPECTED_OF_SERVER = 5e-2
EXPECTED_INT8 = {"float32": 2e-2, "float16": 2e-2, "bfloat16": 5e-2}  # activations are rounded to 8 bits in any dtype
WARN, STOP = 3.0, 30.0  # times what is expected


def expected_difference(quantization: str, compute_dtype: str, temperature: float) -> float:
    """Return the mean absolute difference of log-probs, in nats a token, that rounding leaves in a precision.

    A temperature below 1 multiplies the logits, and with them their rounding.
    """
    expected = EXPECTED_INT8 if quantization == "int8" else EXPECTED
    return expected[compute_dtype] / min(1.0, temperature or 1.0)


class SamplingCheck:
    """Looks at every step's difference between sampling and training.

    Args:
        quantization, compute_dtype: as in a plan's settings.
        temperature: that completions are sampled at.
        checked: the model was held against stock transformers when it was loaded.
        server: a server samples.
    """

    def __init__(
        self, quantization: str, compute_dtype: str, temperature: float, checked: bool = False, server: bool = False
    ) -> None:
        self.expected = expected_difference(quantization, compute_dtype, temperature)
        if server:
            self.expected = max(self.expected, EXPECTED_OF_SERVER / min(1.0, temperature or 1.0))
        self.precision = compute_dtype if quantization == "none" else f"{quantization} with {compute_dtype}"
        ways = [
            *([] if checked else ["hardware.check=always, which holds the model against stock transformers"]),
            *([] if compute_dtype == "float32" else ["hardware.compute_dtype=float32"]),
            "shorter texts",
        ]
        if server:
            ways = ["weights in the server that are those of the plan", "grpo.importance_sampling_correction=true"]
        self._advice = f"try {', or '.join(ways)}"
        self._warned = False

    def check(self, difference: float | None, step: int, say: Callable[[str], None]) -> None:
        """Say once that a step's difference is beyond what rounding explains.

        Args:
            difference: the step's ``sampling/logp_difference``; None: nothing was compared.

        Raises:
            RunError: it is so far beyond that the sampled completions are not the trained policy's.
        """
        if difference is None or difference <= WARN * self.expected:
            return
        sentence = (
            f"step {step}: log-probs of sampled tokens differ between sampling and training by {difference:.2g} nats a "
            f"token (sampling/logp_difference), where rounding in {self.precision} explains {self.expected:.2g}"
        )
        if not difference <= STOP * self.expected:
            raise RunError(f"{sentence}: the policy that samples is not the one that trains; {self._advice}")
        if not self._warned:
            say(f"{sentence}; {self._advice}")
            self._warned = True
