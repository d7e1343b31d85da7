"""The proof of a GGUF: its numbers are the merged model's, and its predictions those of what it reproduces."""

from pathlib import Path
from typing import Any

import torch

from lowmem_rlhf.engine.load import first_sentence, quiet
from lowmem_rlhf.errors import UserError
from lowmem_rlhf.export.gguf.read import check_numbers, read_model
from lowmem_rlhf.export.proof.outputs import ROOM, PolicyOutputs
from lowmem_rlhf.export.proof.stock import Reference, stock_logits
from lowmem_rlhf.export.proof.verify import proof_of_logits
from lowmem_rlhf.export.shards import read_tensors
from lowmem_rlhf.hardware.memory import free_bytes


def proof_of_gguf(
    file: Path, folder: Path, live: PolicyOutputs, reference: Reference | None, kind: str
) -> dict[str, Any]:
    """Compare a GGUF's numbers with those of the merged model in ``folder``, and its predictions as `proof_of_logits`.

    Raises:
        RunError: the numbers differ by more than their kind explains, or the model is another one.
    """
    try:
        furthest = check_numbers(file, folder)
        if 4 * sum(one.elements for one in read_tensors(folder).values()) > ROOM * free_bytes(torch.device("cpu")):
            return {"gguf": "its predictions were not compared: there is no room for it", "judged": []}
        with quiet(), torch.device("cpu"):
            model = read_model(file, folder).eval()
    except UserError as error:
        unread = f"not compared: it is of a family that is not read back here ({first_sentence(error)})"
        return {"gguf": unread, "judged": []}
    proof = proof_of_logits(live, stock_logits(model, live.ids), reference, "the GGUF", kind)
    reported = ("mean_kl", "top1_agreement", "mean_kl_to_adapter_on_original", "kept_in_predictions")
    facts = {f"gguf_{key}": proof[key] for key in reported if key in proof}
    return facts | {"gguf_largest_error_in_steps": furthest, "judged": proof["judged"]}
