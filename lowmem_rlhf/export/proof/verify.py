"""The proof of an export: it is loaded as others load it, and its predictions are held against what it reproduces.

That is the live policy for what stands on its own numbers, and the adapter on the unquantized base, in stock peft, for
what stands on these. The distance to the live policy is told in either case.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowmem_rlhf.engine.load import first_sentence, quiet
from lowmem_rlhf.engine.whole import load_whole
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.proof.compare import compare
from lowmem_rlhf.export.proof.live import ROOM, Live, Logits, in_float32
from lowmem_rlhf.export.proof.stock import LIVE, Reference, hold, stock_logits
from lowmem_rlhf.export.shards import read_tensors
from lowmem_rlhf.hardware.capabilities import capabilities
from lowmem_rlhf.hardware.memory import free_bytes, is_out_of_memory, release

OTHER_MODEL = 3.0  # nats a token, where nothing else is known: no export of the same run is so far from its live policy
NO_ROOM = "not measured: there is no room for the unquantized base"


def proof_of_logits(
    live: Live, logits: Logits, reference: Reference | None, what: str, kind: str, arithmetic: str = "float32"
) -> dict[str, Any]:
    """Return the comparison of an export's logits with the live policy, and with what it is held against.

    Args:
        reference: None: there is no room for it.
        what: the export, for messages.
        kind: of numbers that it is stored as.
        arithmetic: dtype of its own.

    Raises:
        RunError: it has lost the adapter, or is another model.
    """
    said = live.exact or live.said
    to_live = compare(said.policy, said.base, logits)
    found: dict[str, Any] = {"compared_on": live.source, **to_live.facts()}
    if said is not live.said:
        as_computed = compare(live.said.policy, live.said.base, logits)
        found[f"mean_kl_with_{live.compute_dtype}_arithmetic"] = as_computed.mean_kl
    if reference is None:
        if not to_live.mean_kl < OTHER_MODEL:
            raise RunError(f"{what}, loaded again, is another model: its KL to {LIVE} is {to_live.mean_kl:.2g}")
        return found | {"kept_in_predictions": NO_ROOM, "judged": []}
    compared = compare(reference.said.policy, reference.said.base, logits)
    judged = compared.check(what, reference.name, reference.bound(compared.tokens, kind, arithmetic))
    if reference.name != LIVE:
        found["mean_kl_to_adapter_on_original"] = compared.mean_kl
    return found | {"kept_in_predictions": compared.kept, "judged": [judged]}


def proof_of_adapter(folder: Path, live: Live, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare an adapter folder, loaded by stock peft onto a stock base in the run's precision, with the live policy.

    Raises:
        RunError: it cannot be loaded, or is not the live policy.
    """
    held = hold(live, folder, device, settings)
    compared = compare(held.against.policy, held.against.base, held.logits)
    found = {"compared_on": live.source, **compared.facts()}
    if held.against is not live.said:
        as_computed = compare(live.said.policy, live.said.base, held.logits)
        found[f"mean_kl_with_{live.compute_dtype}_arithmetic"] = as_computed.mean_kl
    return found | {"kept_in_predictions": compared.kept, "judged": held.judged}


def proof_of_merged(
    folder: Path,
    live: Live,
    judged: list[dict[str, Any]],
    reference: Reference | None,
    kind: str,
    device: torch.device,
) -> dict[str, Any]:
    """Load a merged folder again and compare it (see `proof_of_logits`), after what was ``judged`` of the live policy.

    Raises:
        RunError: it cannot be loaded, has lost the adapter, or is another model.
    """
    with stock_model(folder, device, live.recipe.trust_remote_code) as model:
        if not capabilities(model.device).on_cpu:
            in_float32(model, model.dtype, device)  # as the live policy, where there is room
        logits = stock_logits(model, live.ids)
        arithmetic = str(model.dtype).removeprefix("torch.")
    proof = proof_of_logits(live, logits, reference, "the merged model", kind, arithmetic)
    return proof | {"judged": judged + proof["judged"]}


@contextmanager
def stock_model(folder: Path, device: torch.device, trust_remote_code: bool) -> Iterator[Any]:
    """Load a folder as `AutoModelForCausalLM` does: on the device, else in host memory, else partly from the disk."""
    with tempfile.TemporaryDirectory() as offloaded:
        try:
            with quiet():
                model = load_whole(
                    AutoModelForCausalLM,
                    folder,
                    str(folder),
                    use_safetensors=True,
                    trust_remote_code=trust_remote_code,
                    **placement(folder, device, Path(offloaded)),
                )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, UserError) as error:
            if is_out_of_memory(error):
                raise RunError("memory ran out while the export was loaded again; take --device cpu") from error
            raise RunError(f"the export cannot be loaded again: {first_sentence(error)}; nothing was kept") from error
        yield model.eval()
        del model
        release(device)


def placement(folder: Path, device: torch.device, offload: Path) -> dict[str, Any]:
    """Return where and in which dtype a folder's model is loaded: keywords of `from_pretrained`.

    A CPU computes in fp32 where there is room, since float16 takes it ten times as long; the numbers are the same.
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
