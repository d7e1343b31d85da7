"""The user's own llama.cpp: its converter and its quantizer, on the PATH or under $LLAMA_CPP."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lowmem_rlhf.errors import RunError
from lowmem_rlhf.export.gguf.tokenizer import ADD_BOS, ADD_EOS
from lowmem_rlhf.progress import message

PENALTY, PENALTY_LAST = "general.sampling.penalty_repeat", "general.sampling.penalty_last_n"
CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"


BY_QUANTIZER = ("q4_k_m", "q5_k_m", "q6_k")  # kinds that llama-quantize makes, and the converter does not


def find_converter() -> Path | None:
    """Return llama.cpp's converter, or None."""
    return _find(CONVERTER, ("",))


def find_quantizer() -> Path | None:
    """Return llama.cpp's quantizer, or None."""
    return _find(QUANTIZER, ("", "bin", "build/bin", "build/bin/Release"))


def _find(name: str, places: tuple[str, ...]) -> Path | None:
    if root := os.environ.get("LLAMA_CPP"):
        for place in places:
            if path := shutil.which(name, path=str(Path(root).expanduser() / place)):
                return Path(path)
            script = Path(root).expanduser() / place / name
            if script.suffix == ".py" and script.is_file():  # it need not be executable
                return script
    path = shutil.which(name)
    return Path(path) if path else None


def convert(converter: Path, folder: Path, target: Path, kind: str) -> bool:
    """Write a GGUF with the user's converter, and report that.

    Returns:
        False if it failed, whose reason is reported; then our writer takes over.
    """
    whose = f"{converter} of your llama.cpp"
    message(f"the GGUF is written by {whose}")
    command = [sys.executable, str(converter), str(folder), "--outfile", str(target), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and target.is_file():
        return True
    with suppress(OSError):
        target.unlink()
    message(f"{whose} failed ({_last_line(done.stderr)}); the GGUF is written without it")
    return False


def set_frame(file: Path, add_bos: bool | None) -> None:
    """Set whether a converter's GGUF puts a BOS before every text; it puts an EOS behind none.

    Args:
        add_bos: None leaves both as the converter set them.
    """
    from gguf import GGUFReader

    if add_bos is None:
        return
    try:
        reader = GGUFReader(file, "r+")
    except (ValueError, IndexError):  # a file of a newer form
        message(f"your converter's GGUF cannot be read here, so its {ADD_BOS} is its own")
        return
    for key, value in ((ADD_BOS, add_bos), (ADD_EOS, False)):
        field = reader.get_field(key)
        if field is not None:
            field.parts[field.data[0]][0] = value
        elif key == ADD_BOS:
            message(
                f"your converter's GGUF has no {key}, which should be {str(value).lower()}: llama.cpp goes by its own "
                "default"
            )
    reader.data.flush()


def tell_penalty(file: Path, repetition_penalty: float) -> None:
    """Tell of a repetition penalty that a converter's GGUF does not hold, or not over the whole text."""
    from gguf import GGUFReader

    held = False
    with suppress(ValueError, IndexError):  # a file of a newer form
        reader = GGUFReader(file)
        held = all(reader.get_field(key) is not None for key in (PENALTY, PENALTY_LAST))
    if repetition_penalty != 1.0 and not held:
        message(
            f"your converter's GGUF lacks {PENALTY} or {PENALTY_LAST}: give llama.cpp --repeat-penalty "
            f"{repetition_penalty:g} --repeat-last-n -1, as in the run"
        )


def quantize(quantizer: Path, source: Path, target: Path, kind: str) -> None:
    """Quantize a GGUF with the user's llama-quantize, and report that.

    Args:
        kind: as llama.cpp calls it: q4_k_m, q5_k_m or q6_k.

    Raises:
        RunError: it failed.
    """
    message(f"{kind} is made by {quantizer} of your llama.cpp")
    command = [str(quantizer), str(source), str(target), kind.upper()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        raise RunError(f"{quantizer} failed: {_last_line(done.stderr or done.stdout)}; nothing was kept")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
