"""Whether an adapter's files load in stock peft on the whole model that its base's text tower belongs to.

The model is built without weights: what is asked is whether every tensor finds its layer, and no layer lacks one.
"""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig

from lowmem_rlhf.architecture.adapters import WEIGHTS
from lowmem_rlhf.architecture.families.wrappers import auto_class, text_key
from lowmem_rlhf.engine.load import first_sentence, quiet
from lowmem_rlhf.engine.whole import differing_tensors
from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.source import base_folder, read_config
from lowmem_rlhf.recipe.schema import Recipe


def check_names(folder: Path, adapter: Path, recipe: Recipe) -> str:
    """Put an adapter on the whole model's class in stock peft, and return the class's name.

    Args:
        folder: of the export.
        adapter: the folder of the trained adapter, under the text-only class's names.

    Raises:
        RunError: peft makes other tensors of it, or they are not those that were trained.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    base = base_folder(recipe.model, recipe.revision)
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(base)
            auto = getattr(transformers, auto_class(read_config(base)))
            model = get_peft_model(auto.from_config(config), PeftConfig.from_pretrained(str(folder)))
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise RunError(
            f"peft cannot put the adapter on the whole model: {first_sentence(error)}; --for text needs the text-only "
            "class alone. Nothing was kept"
        ) from error
    stored = load_file(folder / WEIGHTS, device="cpu")
    if difference := differing_tensors(stored, wanted):
        raise RunError(f"the adapter does not fit what peft makes of it: its files {difference}; nothing was kept")
    trained = {text_key(name): x for name, x in load_file(adapter / WEIGHTS, device="cpu").items()}
    renamed = {text_key(name): x for name, x in stored.items()}
    if trained.keys() != renamed.keys() or any(not torch.equal(x, renamed[name]) for name, x in trained.items()):
        raise RunError("the adapter's renamed tensors are not those that were trained; nothing was kept")
    return type(model.get_base_model()).__name__
