"""The proof of an export: it is loaded as others load it, and its predictions are compared with what it reproduces.

An export onto the run's own (quantized) weights reproduces the live policy; one onto the original weights reproduces
the adapter in stock peft on the unquantized base. The distance to the live policy is reported in either case.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from lowmem_rlhf.architecture.families.wrappers import auto_class, is_wrapper
from lowmem_rlhf.engine.load import first_sentence, quiet
from lowmem_rlhf.engine.whole import load_whole
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.proof.compare import compare
from lowmem_rlhf.export.proof.outputs import ROOM, PolicyOutputs, SequenceLogits, in_float32
from lowmem_rlhf.export.proof.stock import LIVE, Reference, compare_with_stock, stock_logits
from lowmem_rlhf.export.shards import read_tensors
from lowmem_rlhf.export.source import read_config
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.memory import free_bytes, is_out_of_memory, release

OTHER_MODEL = 3.0  # nats a token, where nothing else is known: no export of the same run is so far from its live policy
NO_ROOM = "not measured: there is no room for the unquantized base"


def proof_of_logits(
    live: PolicyOutputs,
    logits: SequenceLogits,
    reference: Reference | None,
    what: str,
    kind: str,
    arithmetic: str = "float32",
) -> dict[str, Any]:
    """Return the comparison of an export's logits with the live policy, and with its reference.

    Args:
        reference: what it reproduces; None where there is no room for that.
        what: the export, for messages.
        kind: how its numbers are stored: a dtype or a kind of GGUF.
        arithmetic: the dtype that it computes in.

    Raises:
        RunError: it has lost the adapter, or is another model.
    """
    expected = live.exact_logits or live.logits
    to_live = compare(expected.policy, expected.base, logits)
    proof: dict[str, Any] = {"compared_on": live.source, **to_live.facts()}
    if expected is not live.logits:
        as_computed = compare(live.logits.policy, live.logits.base, logits)
        proof[f"mean_kl_with_{live.compute_dtype}_arithmetic"] = as_computed.mean_kl
    if reference is None:
        if not to_live.mean_kl < OTHER_MODEL:
            raise RunError(f"{what}, loaded again, is another model: its KL to {LIVE} is {to_live.mean_kl:.2g}")
        return proof | {"kept_in_predictions": NO_ROOM, "judged": []}
    compared = compare(reference.logits.policy, reference.logits.base, logits)
    verdict = compared.check(what, reference.name, reference.bound(compared.tokens, kind, arithmetic))
    if reference.name != LIVE:
        proof["mean_kl_to_adapter_on_original"] = compared.mean_kl
    return proof | {"kept_in_predictions": compared.kept, "judged": [verdict]}


def proof_of_adapter(
    folder: Path, live: PolicyOutputs, device: torch.device, settings: dict[str, Any]
) -> dict[str, Any]:
    """Compare an adapter folder, loaded by stock peft onto a stock base in the run's precision, with the live policy.

    Raises:
        RunError: it cannot be loaded, or is not the live policy.
    """
    stock = compare_with_stock(live, folder, device, settings)
    compared = compare(stock.live_logits.policy, stock.live_logits.base, stock.logits)
    proof = {"compared_on": live.source, **compared.facts()}
    if stock.live_logits is not live.logits:
        as_computed = compare(live.logits.policy, live.logits.base, stock.logits)
        proof[f"mean_kl_with_{live.compute_dtype}_arithmetic"] = as_computed.mean_kl
    return proof | {"kept_in_predictions": compared.kept, "judged": stock.verdicts}


def proof_of_merged(
    folder: Path,
    live: PolicyOutputs,
    verdicts: list[dict[str, Any]],
    reference: Reference | None,
    kind: str,
    device: torch.device,
) -> dict[str, Any]:
    """Load a merged folder again and compare it (see `proof_of_logits`).

    Args:
        verdicts: of the live policy's comparison with stock, which come first in the proof.
        kind: the dtype that the weights are stored in.

    Raises:
        RunError: it cannot be loaded, has lost the adapter, or is another model.
    """
    with stock_model(folder, device, live.recipe.trust_remote_code) as model:
        if not capabilities(model.device).on_cpu:
            in_float32(model, model.dtype, device)  # as the live policy, where there is room
        logits = stock_logits(model, live.ids)
        arithmetic = str(model.dtype).removeprefix("torch.")
    proof = proof_of_logits(live, logits, reference, "the merged model", kind, arithmetic)
    return proof | {"judged": verdicts + proof["judged"]}


@contextmanager
def stock_model(folder: Path, device: torch.device, trust_remote_code: bool) -> Iterator[Any]:
    """Load a folder with its auto class: on the device, else in host memory, else partly on the disk."""
    auto = getattr(transformers, auto_class(read_config(folder)))
    with tempfile.TemporaryDirectory() as offloaded:
        try:
            with quiet():
                model = load_whole(
                    auto,
                    folder,
                    str(folder),
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    **placement(folder, device, Path(offloaded)),
                )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, UserError) as error:
            if is_out_of_memory(error):
                raise RunError("memory ran out while the export was loaded again; take --device cpu") from error
            alone = "; --for text writes the text-only class alone" if is_wrapper(read_config(folder)) else ""
            raise RunError(
                f"the export cannot be loaded again: {first_sentence(error)}{alone}; nothing was kept"
            ) from error
        yield model.eval()
        del model
        release(device)


def placement(folder: Path, device: torch.device, offload: Path) -> dict[str, Any]:
    """Return where and in which dtype to load a folder's model, as keywords of `from_pretrained`.

    A CPU computes in fp32 where there is room, since float16 is ten times as slow there; the weights are the same.
    """
    tensors = list(read_tensors(folder).values())
    stored = sum(one.end - one.begin for one in tensors)
    wide = 4 * sum(one.elements for one in tensors)
    if not capabilities(device).on_cpu and stored < ROOM * free_bytes(device):
        return {"dtype": "auto", "device_map": {"": str(device)}}
    host = int(ROOM * free_bytes(torch.device("cpu")))
    if stored > host:
        return {"dtype": "auto", "device_map": "auto", "max_memory": {"cpu": host}, "offload_folder": str(offload)}
    return {"dtype": torch.float32 if wide < host else "auto", "device_map": {"": "cpu"}}
