"""Looking up the sizes of a recipe's model, wherever it lies: on this machine, in the catalogue, on the Hub.

No weights are read and no torch is imported.
"""

from dataclasses import replace
from pathlib import Path

from lowmem_rlhf.architecture.dimensions import ModelDimensions, from_config_file
from lowmem_rlhf.architecture.source import is_local, resolve_model


def model_dimensions(model: str, revision: str | None = None, trust_remote_code: bool = True) -> ModelDimensions:
    """Return the sizes of a model.

    A Hub id is looked up in the Hub's cache on this machine, then in the catalogue that ships with this package, then
    on the Hub. A revision is asked for on the Hub before the catalogue answers for it, with a note.

    Args:
        model: as in a recipe: a Hub id, a local folder, a ``.gguf`` file or ``package:PACKAGE/FILE``.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: whether a run may load the model's own code; nothing is run here.

    Raises:
        UserError: there is no such model, it cannot be reached, or it is no dense decoder-only language model.
    """
    resolved = resolve_model(model)
    if not is_local(resolved):
        return _of_hub_model(resolved, revision, trust_remote_code)
    path = Path(resolved)
    if path.is_dir():
        return from_config_file(path / "config.json", model, trust_remote_code)
    from lowmem_rlhf.architecture.gguf_dimensions import from_gguf

    return from_gguf(path, model)


def _of_hub_model(model: str, revision: str | None, trust_remote_code: bool) -> ModelDimensions:
    from lowmem_rlhf.architecture import catalogue, hub

    if cached := hub.cached_config(model, revision):
        return from_config_file(cached, model, trust_remote_code)
    known = catalogue.find(model)
    if known and revision is None:
        return known
    try:
        fetched = hub.fetch_config(model, revision)
    except hub.HubUnreachable:
        if known is None:
            raise
        note = f"the Hub cannot be reached: these are the sizes of {model} in the catalogue, not of revision {revision}"
        return replace(known, note=note)
    return from_config_file(fetched, model, trust_remote_code)
