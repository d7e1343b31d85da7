"""What went wrong with a folder or a data set of the Hub, in a sentence that leads on."""

import glob

from lowmem_rlhf.errors import one_line
from lowmem_rlhf.paths import local_path
from lowmem_rlhf.recipe.data_sources import ENDINGS, is_folder


def hub_problem(error: Exception, source: str, config: str | None, split: str, key: str) -> str:
    """Return the message for an error of `datasets`; ``key`` is the recipe key that named the source."""
    from datasets.exceptions import DatasetNotFoundError

    text = one_line(error)
    near = _near_file(source)
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{key}: there is no data set {source!r} on the Hub that this machine may read ({text}){near}; check the "
            f"id, log in with `hf auth login` if it is private or gated, or give a local file: {key}=PATH"
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return (
            f"{key}: {source!r} is no file here and the Hub cannot be reached for it ({text}){near}; connect once to "
            f"fill the cache, or download the data elsewhere and give the file: {key}=PATH"
        )
    if "nknown split" in text or "corresponds to no data" in text or "nrecognized instruction" in text:
        remedy = (
            ""
            if key == "data.train"
            else "; or set it to data.train_split to hold rows out of training, or data.eval_size=0"
        )
        return f"{key}_split: {source!r} has no split {split!r} ({text}); set {key}_split to one that exists{remedy}"
    if "BuilderConfig" in text or "Config name is missing" in text:
        return f"data.config: got {config!r} for {source!r}, which is not one it has ({text}); set data.config"
    if is_folder(source):
        return f"{key}: the folder {source} cannot be read: {text}; name a file in it: {key}=PATH ({ENDINGS})"
    return f"{key}: {source!r} cannot be loaded from the Hub: {text}; a local file works too: {key}=PATH"


def _near_file(source: str) -> str:
    """Name a local file that has the name of the source and an ending."""
    path = local_path(source)
    near = sorted(path.parent.glob(f"{glob.escape(path.name)}.*")) if path.parent.is_dir() and path.name else []
    return f"; did you mean {str(near[0])!r}?" if near else ""
