"""`export`: from a run to a folder that others load. It appears whole, once it is proven, or not at all."""

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_rlhf.architecture.adapters import CONFIG, HEAD, WEIGHTS, adapter_folder
from lowmem_rlhf.architecture.lookup import model_dimensions
from lowmem_rlhf.errors import RunError, UserError
from lowmem_rlhf.export.card.facts import without_folders
from lowmem_rlhf.export.wish import (
    ADAPTER,
    EXPORT,
    GGUF,
    MERGED,
    OLLAMA,
    ORIGINAL,
    QUANTIZED,
    Wish,
    check_disk,
    check_target,
    check_wish,
    free_disk,
)
from lowmem_rlhf.files import begin_folder, delete, dumps, finish_folder
from lowmem_rlhf.hardware.detect import detect
from lowmem_rlhf.hardware.device import Device
from lowmem_rlhf.inference.open_run import OpenRun
from lowmem_rlhf.inference.opening import check_device
from lowmem_rlhf.planning.memory.export import export_disk_bytes, export_memory_bytes
from lowmem_rlhf.quiet import hush
from lowmem_rlhf.run.base_file import BASE
from lowmem_rlhf.run.directory import RunDirectory
from lowmem_rlhf.run.start import paths_explained

if TYPE_CHECKING:
    import torch

    from lowmem_rlhf.export.merging.run import Merged

CRITIC, START = "critic", "start"  # folders of an exported adapter
WORK = "merged.tmp"  # merged weights that a GGUF is made of
DTYPE_OF_GGUF = {"f16": "float16", "bf16": "bfloat16"}


class Export:
    """One export of a run.

    Raises:
        UserError: what is asked for cannot be made of this run.
    """

    device: "torch.device"

    def __init__(self, run: RunDirectory, wish: Wish) -> None:
        self.run = run
        self.opened = OpenRun(run, wish.step)
        self.written, self.recipe = self.opened.written, self.opened.recipe
        self.wish = check_wish(wish, self.recipe, run)
        self.format = str(self.wish.format)
        self.target = wish.output or run.path / "export" / self.format
        self.adapter = self.opened.adapter_folder
        self.settings = asdict(self.opened.plan.settings)
        check_target(self.target)

    @property
    def onto_quantized(self) -> bool:
        """Whether the change is added to dequantized weights; where the base was not quantized both are the same."""
        return self.wish.onto == QUANTIZED and self.settings["quantization"] != "none"

    def plan(self) -> dict[str, Any]:
        """Return what the export will take: bytes of memory by part, of disk, and of the disk that is free.

        Raises:
            UserError: the sizes of the base are not known.
        """
        wish = self.wish
        with paths_explained(self.run.path, self.written):
            dims = model_dimensions(self.recipe.model, self.recipe.revision)
        dtype = wish.dtype or ("float32" if dims.overflows_float16 else "float16")
        onto = QUANTIZED if self.onto_quantized else ORIGINAL
        precision = (self.settings["quantization"], self.settings["compute_dtype"])
        parts = export_memory_bytes(dims, *precision, dtype, onto, wish.quantize)
        disk = export_disk_bytes(dims, dtype, wish.quantize)
        if self.format == ADAPTER:
            parts = {"live_policy": parts["live_policy"], "loaded_again": parts["stock_policy"]}
            disk = sum(path.stat().st_size for path in self.adapter.rglob("*.safetensors"))
        return {
            "format": self.format,
            "dtype": None if self.format == ADAPTER else dtype,
            "memory_bytes": parts,
            "disk_bytes": disk,
            "free_disk_bytes": free_disk(self.target),
        }

    def make(self) -> dict[str, Any]:
        """Write the export and return what export.json holds; with ``--push`` it is uploaded.

        Raises:
            UserError: the base is gone or not the run's, or a dtype was asked for that loses the change.
            RunError: the disk is too small or filled up, or the export is not what the live policy is.
        """
        hush()
        found = detect(self.wish.device or self.recipe.hardware.device)
        check_device(found, self.settings["compute_dtype"])
        with paths_explained(self.run.path, self.written):
            self.opened.check()
            return self._make(found)

    def _make(self, found: Device) -> dict[str, Any]:
        try:
            needed = self.plan()["disk_bytes"]
        except UserError:
            needed = 0  # sizes that the planner does not know: the weights themselves tell, once they are here
        check_disk(needed, self.target)

        import torch

        self.device = torch.device(found.torch_device)
        makers = {ADAPTER: self._adapter, MERGED: self._merged, GGUF: self._gguf, OLLAMA: self._gguf}
        with self._whole_or_not() as folder:
            facts = {"format": self.format, "step": self.wish.step, **makers[self.format](folder)}
            self._describe(folder, facts)
        if self.wish.push:
            from lowmem_rlhf.export.push import push

            try:
                facts["pushed"] = push(self.target, self.wish.push)
            except KeyboardInterrupt as stop:
                stop.add_note(f"the export in {self.target} is whole, what arrived of it is not sent again")
                raise
        return {"folder": str(self.target), **facts}

    @contextmanager
    def _whole_or_not(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes the export when the block ends without an error."""
        folder = None
        try:
            folder = begin_folder(self.target)
            yield folder
            finish_folder(self.target)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
            what = "the disk is full" if full else str(error)
            raise RunError(
                f"the export to {self.target} cannot be written: {what}; nothing was kept, make room or choose another "
                "folder with --output"
            ) from error
        except KeyboardInterrupt as stop:
            stop.add_note("nothing was kept")
            raise
        finally:
            if folder is not None:
                delete(folder)

    def _describe(self, folder: Path, facts: dict[str, Any]) -> None:
        from lowmem_rlhf.export.card.write import write_card

        (folder / EXPORT).write_text(dumps(facts, indent=2) + "\n", encoding="utf-8")
        write_card(folder, self.run, facts)

    def _adapter(self, folder: Path) -> dict[str, Any]:
        """Copy the adapter, and load it with stock peft."""
        from lowmem_rlhf.export.proof.live import live_policy
        from lowmem_rlhf.export.proof.scores import proof_of_scores
        from lowmem_rlhf.export.proof.verify import proof_of_adapter

        copy_adapter(self.adapter, folder, (WEIGHTS, CONFIG))
        heads = self._heads(folder)
        live = live_policy(self.opened, self.wish.device)
        if self.recipe.spec.output == "scores":
            proof = proof_of_scores(folder, live, self.device, self.settings)
        else:
            proof = proof_of_adapter(folder, live, self.device, self.settings)
        return {**heads, "proof": proof}

    def _merged(self, folder: Path) -> dict[str, Any]:
        merged = self._merge(folder, self.wish.dtype)
        return {**merged.facts(), **self._heads(folder), "proof": merged.proof()}

    def _gguf(self, folder: Path) -> dict[str, Any]:
        """Merge, turn that into a GGUF, and compare both with the live policy."""
        from lowmem_rlhf.export.bar import bar
        from lowmem_rlhf.export.framing import framing
        from lowmem_rlhf.export.gguf.proof import proof_of_gguf
        from lowmem_rlhf.export.gguf.write import write_gguf
        from lowmem_rlhf.export.tokenizer import load_tokenizer

        kind = self.wish.quantize or ""
        work = folder / WORK
        work.mkdir()
        merged = self._merge(work, DTYPE_OF_GGUF.get(kind))
        proof = merged.proof()
        name = re.sub(r"[^\w.-]+", "-", self.recipe.name).strip(".-") or "model"
        file = folder / f"{name}-{kind.upper()}.gguf"
        frame = framing(load_tokenizer(work), self.recipe.data)
        with bar(f"writing {file.name}") as moved:
            write_gguf(work, file, kind, moved, self.device, frame.add_bos)
        if self.format == OLLAMA:
            from lowmem_rlhf.export.ollama.write import write_ollama

            g = self.recipe.generation
            asked = {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k, "min_p": g.min_p}
            write_ollama(work, file, folder, asked | {"num_predict": g.max_completion_length})
        of_gguf = proof_of_gguf(file, work, merged.live, merged.reference, DTYPE_OF_GGUF.get(kind, kind))
        proof |= of_gguf | {"judged": proof["judged"] + of_gguf["judged"]}
        delete(work)
        return {**merged.facts(), "quantize": kind, "file": file.name, **frame.facts(), "proof": proof}

    def _merge(self, folder: Path, dtype: str | None) -> "Merged":
        from lowmem_rlhf.export.merging.run import merge_run

        return merge_run(self, folder, dtype)

    def _heads(self, folder: Path) -> dict[str, Any]:
        """Copy the heads that were asked for: a reward model's beside its adapter, a critic's into a folder of its own.

        Raises:
            UserError: the run has none.
        """
        if not self.wish.heads:
            return {}
        if (self.adapter / HEAD).is_file():
            shutil.copyfile(self.adapter / HEAD, folder / HEAD)
            return {"heads": [HEAD]}
        critic = self.adapter / CRITIC
        if not (critic / HEAD).is_file():
            raise UserError(f"--heads: the run in {self.run.path} trained no value or score head; leave it out")
        parts = {CRITIC: critic}
        if self.recipe.adapter and self.recipe.spec.critic(self.recipe) == "adapter":  # it lies above the initial one
            self.opened.check_initial_adapter()
            parts[START] = adapter_folder(self.recipe.adapter)
        copied = []
        for part, source in parts.items():
            copied += [f"{part}/{name}" for name in copy_adapter(source, folder / part, (WEIGHTS, CONFIG, HEAD))]
        return {"heads": copied}


def copy_adapter(source: Path, target: Path, names: tuple[str, ...]) -> list[str]:
    """Copy an adapter and what is known of its base, which is named without a folder of this machine.

    Args:
        source, target: folders.
        names: of its files.

    Returns:
        The names of those that there are.
    """
    target.mkdir(exist_ok=True)
    copied = [name for name in names if (source / name).is_file()]
    for name in (*copied, *([BASE] if (source / BASE).is_file() else [])):
        shutil.copyfile(source / name, target / name)
    if CONFIG in copied:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        base = str(config.get("base_model_name_or_path") or "")
        if (local := without_folders({"model": base})[0]["model"]) != base:
            config["base_model_name_or_path"] = local
            (target / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return copied
