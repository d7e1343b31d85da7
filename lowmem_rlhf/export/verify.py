"""The proof of an export: it is loaded as others load it, and its predictions are held against the live policy's.

The models come one after another, and of each only the logits of a few hundred tokens stay.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.compare import compare
from lowmem_rlhf.export.gguf_read import read_model
from lowmem_rlhf.export.live import ROOM, Live, Logits, Said, in_float32
from lowmem_rlhf.export.shards import read_tensors
from lowmem_rlhf.memory import free_bytes, is_out_of_memory, release
from lowmem_rlhf.model.adapters import HEAD, WEIGHTS
from lowmem_rlhf.model.load import DTYPES, first_sentence, load_base, quiet
from lowmem_rlhf.model.whole import differing_tensors, load_whole
from lowmem_rlhf.recipe import Recipe

SCORES_OFF = 0.1  # of the scores' spread, or of 1: two precisions of one reward model differ by less
OTHER_MODEL = 3.0  # nats a token: no 4-bit GGUF of the same model is so far away


def proof_of_logits(live: Live, logits: Logits, same_base: Said | None, what: str) -> dict[str, Any]:
    """Return the comparison of an export's logits with the live policy.

    Args:
        same_base: the adapter on the weights that the export was made of, with fp32 arithmetic; None: not known.
        what: the export, for messages.

    Raises:
        RunError: it has lost the adapter, or is another model.
    """
    said = live.said if same_base is live.said else live.exact or live.said
    found: dict[str, Any] = {"compared_on": live.source, **compare(said.policy, said.base, logits).facts()}
    if said is not live.said:
        as_computed = compare(live.said.policy, live.said.base, logits)
        found[f"mean_kl_with_{live.compute_dtype}_arithmetic"] = as_computed.mean_kl
    if same_base is None:
        return found | {"kept_in_predictions": "not measured: there is no room for the unquantized base"}
    compared = compare(same_base.policy, same_base.base, logits)
    compared.check(what)
    if same_base is not said:
        found["mean_kl_to_adapter_on_original"] = compared.mean_kl
    return found | {"kept_in_predictions": compared.kept}


def proof_of_adapter(folder: Path, live: Live, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare an adapter folder, loaded by stock peft onto a stock base in the run's precision, with the live policy.

    Raises:
        RunError: it cannot be loaded, or is not the live policy.
    """
    with _stock_adapter(folder, live.recipe, device, settings) as model:
        exact = live.exact is not None and in_float32(model, DTYPES[settings["compute_dtype"]], device)
        logits = stock_logits(model, live.ids)
    return proof_of_logits(live, logits, live.exact if exact else live.said, "the adapter")


@torch.no_grad()
def proof_of_scores(folder: Path, live: Live, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare the scores of a reward model's adapter in stock peft, with its head, with the live ones.

    Raises:
        RunError: it cannot be loaded, or scores otherwise.
    """
    head = load_file(folder / HEAD, device=str(device))
    found = []
    with _stock_adapter(folder, live.recipe, device, settings) as model:
        for one in live.ids:
            inputs = torch.tensor([one], dtype=torch.long, device=model.device)
            states = model(input_ids=inputs, use_cache=False, output_hidden_states=True).hidden_states[-1]
            found.append(F.linear(states[0, -1].float(), head["weight"], head.get("bias")).cpu())
    scores, wanted = torch.cat(found), torch.zeros(0) if live.scores is None else live.scores
    off, spread = float((scores - wanted).abs().max()), float(wanted.std(correction=0))
    if not off <= max(SCORES_OFF * spread, SCORES_OFF):
        raise RunError(
            f"the reward model, loaded again, scores up to {off:.2g} otherwise than the live one, whose scores have a "
            f"standard deviation of {spread:.2g}; nothing was kept"
        )
    return {"compared_on": live.source, "texts": len(scores), "largest_score_difference": off, "score_std": spread}


def proof_of_gguf(file: Path, folder: Path, live: Live) -> dict[str, Any]:
    """Compare a GGUF's numbers, in the configuration of the merged model in ``folder``, with the live policy.

    Raises:
        RunError: they are not finite, or another model's.
    """
    try:
        with quiet(), torch.device("cpu"):
            model = read_model(file, folder).eval()
    except UserError as error:
        return {"gguf": f"not compared: it is of a family that is not read back here ({first_sentence(error)})"}
    said = live.exact or live.said
    compared = compare(said.policy, said.base, stock_logits(model, live.ids))
    if not compared.mean_kl < OTHER_MODEL:
        raise RunError(f"the GGUF's KL to the live policy is {compared.mean_kl:.2g}: it is another model")
    return {"gguf_mean_kl": compared.mean_kl, "gguf_top1_agreement": compared.top1_agreement}


@contextmanager
def _stock_adapter(folder: Path, recipe: Recipe, device: torch.device, settings: dict[str, Any]) -> Iterator[Any]:
    """Load a stock base in the run's precision, and an adapter onto it by peft."""
    from peft import PeftModel, get_peft_model_state_dict

    precision = (settings["quantization"], settings["compute_dtype"])
    base, _ = load_base(recipe.model, *precision, device, recipe.revision, recipe.trust_remote_code)
    try:
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RunError(f"the adapter cannot be loaded by peft: {first_sentence(error)}; nothing was kept") from error
    stored = load_file(folder / WEIGHTS, device="cpu")
    if said := differing_tensors(stored, get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise RunError(f"the adapter does not fit what peft makes of it: its files {said}; nothing was kept")
    yield model
    del base, model
    release(device)


@torch.no_grad()
def stock_logits(model: Any, ids: Sequence[Sequence[int]]) -> Logits:
    """Return for each sequence of L tokens a stock model's logits (L - 1, V), fp32 on the CPU."""
    inputs = (torch.tensor([one], dtype=torch.long, device=model.device) for one in ids)
    return [model(input_ids=one, use_cache=False).logits[0, :-1].float().cpu() for one in inputs]


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
    if device.type != "cpu" and stored < ROOM * free_bytes(device):
        return {"dtype": "auto", "device_map": {"": str(device)}}
    host = int(ROOM * free_bytes(torch.device("cpu")))
    if stored > host:
        return {"dtype": "auto", "device_map": "auto", "max_memory": {"cpu": host}, "offload_folder": str(offload)}
    return {"dtype": torch.float32 if wide < host else "auto", "device_map": {"": "cpu"}}
