"""The table of model types, for docs/models.md, and one line a type for the terminal."""

import re
from importlib.metadata import version
from typing import Any

Row = dict[str, Any]

ENGINE = ("fp32", "bf16", "nf4")  # what is held against stock number by number
COMMANDS = ("plan", "grpo", "sft", "merge", "gguf")
COLUMNS = (*ENGINE, *COMMANDS)
BAD = ("wrong", "traceback")
TITLES = {
    "packed": "Packed",
    "padded": "Padded",
    "refused": "Refused",
    "wrong": "Wrong",
    "traceback": "Traceback",
    "stock_fails": "Stock transformers fails",
    "not_built": "Not built",
}
ENGINES = {"packed": "exact", "padded": "exact", "wrong": "not exact", "traceback": "fails"}
SAYS = {
    "packed": "Rows are packed without padding, a prompt runs once for all of its completions.",
    "padded": "Rows are padded, and a prompt runs once for each of its completions: slower, and as exact.",
    "refused": "The package ends with this sentence before anything is computed. `engine` says whether what the "
    "planner refuses would be exact; `-` where the model is refused as it is loaded.",
    "wrong": "A number is beyond its bound; no type should stand here.",
    "traceback": "Something else than a sentence came out; no type should stand here.",
    "stock_fails": "There is nothing to hold a number against.",
    "not_built": "No tiny model could be made from the configuration's defaults.",
}
HEAD = """# Model types

This page is made by `python benchmarks/architectures.py --write docs/models.md` with transformers {version}.

Every model type that `AutoModelForCausalLM` knows is built as a tiny random model whose norms, biases and embeddings
have the statistics of real models, and what it computes here is held against stock transformers with the same adapter
in stock peft. A name with a `+` is a further form of a type. A real checkpoint can differ from its type's tiny model in
what its configuration switches on.

- **fp32**: largest difference of a log-prob (training pass; sampled tokens, as they were decoded) and largest relative
  difference of a tensor's adapter gradient. The bound of each is {exact:g}.
- **bf16**, **NF4**: distance of log-probs from fp32 with the same (quantized) weights, the mean over tokens, in units
  of stock's own. Median and mean may be {noise:g} times stock's and {slack:g}; of models with experts only the median
  counts, since another expert for one token moves a mean over few tokens more than rounding does.
- **plan**: whether it fits; planned parameters over the model's.
- **GRPO**, **SFT**: two steps by the command line, on NF4 and in bfloat16.
- **merge**: largest difference of a log-prob of the merged model from the adapter in stock peft, both in fp32.
- **GGUF**: in 16 bits, read again by the export.
- `-`: the command ends with a sentence, which stands below the table.
- \\*: adapters on all linear layers are refused; those of the attention were named in `lora.target_modules`.
"""


def line(row: Row) -> str:
    """Return a type's line for the terminal."""
    why = f": {row['why']}" if row.get("why") and row["verdict"] not in ("packed", "padded") else ""
    return f"{row['type']} {row['verdict']}{why[:200]}"


def page(rows: list[Row]) -> str:
    """Return the page of all types, grouped by verdict."""
    from architecture_checks import EXACT, NOISE, SLACK

    parts = [HEAD.format(version=version("transformers"), exact=EXACT, noise=NOISE, slack=SLACK)]
    for verdict in TITLES:
        group = [row for row in rows if row["verdict"] == verdict]
        if group:
            table = numbers_table if verdict in ("packed", "padded", "wrong") else sentences_table
            parts.append(f"## {TITLES[verdict]} ({len(group)})\n\n{SAYS[verdict]}\n\n{table(group)}")
    return "\n".join(parts)


def sentences_table(rows: list[Row]) -> str:
    """Return a table of types and the sentence that each ended with, and whether the engine alone is exact."""
    lines = ["| type | engine | |", "|---|---|---|"]
    lines += [f"| {row['type']} | {ENGINES.get(row.get('engine', ''), '-')} | {cell(row['why'])} |" for row in rows]
    return "\n".join(lines) + "\n"


def numbers_table(rows: list[Row]) -> str:
    """Return a table of types and their numbers, and below it the sentences of the parts that were refused."""
    head = ("type", "fp32 log-probs", "sampled", "gradients", "bf16", "NF4", "plan", "GRPO", "SFT", "merge", "GGUF")
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * 5 + "|---" * (len(head) - 6) + "|"]
    for row in rows:
        first = row["fp32"]
        cells = [row["type"] + ("\\*" if "targets" in first else "")]
        cells += [f"{first[key]:.0e}" if key in first else "-" for key in ("logps", "sampled", "gradients")]
        cells += [multiple(row.get(column, {})) for column in ("bf16", "nf4")]
        cells += [outcome(row.get(column), column) for column in COMMANDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + sentences(rows)


def multiple(found: Row) -> str:
    """Return the larger of the training pass's and sampling's distance from fp32, in units of stock's own."""
    pairs = [("logps", "noise"), ("sampled", "sampled_noise"), ("sampled_dequantized", "sampled_dequantized_noise")]
    shares = [found[way][0] / max(found[noise][0], 1e-9) for way, noise in pairs if way in found]
    return f"{max(shares):.1f}" if shares else "-"


def outcome(found: Row | None, column: str) -> str:
    """Return how a command ended, in a cell."""
    if found is None or "verdict" in found:
        return "-"
    if column == "plan":
        return f"{found['says']}, {found['parameters']:.2f}"
    if column == "merge":
        return f"{found['logps']:.0e}"
    return "yes"


def sentences(rows: list[Row]) -> str:
    """Return the sentences of parts that were refused, each once, with the types that have it."""
    types: dict[str, list[str]] = {}
    for row in rows:
        for column in COLUMNS:
            if "why" in row.get(column, {}):
                types.setdefault(f"{column}: {cell(row[column]['why'])}", []).append(row["type"])
    return "".join(f"\n- {', '.join(names)}: {text}" for text, names in types.items()) + "\n" if types else ""


def cell(text: str) -> str:
    """Return a sentence without the folders of the machine it was made on, as it may stand in a table."""
    return re.sub(r"(/[\w.-]+)*/(tiny|grpo|sft)\b", "MODEL", text).replace("|", "\\|")
