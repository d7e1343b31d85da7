"""One side of same_bits.py: every shipped recipe planned on every profile, in this one process.

Only the command line's entry point is used, so that it runs with any version of the package. A line of JSON a plan.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

CPU_MEMORY = "16GB"  # in place of what this machine has free


def command(*arguments: str) -> dict[str, Any]:
    """Run the command line; return its exit code and what it printed, standard output as JSON values if it is JSON."""
    from lowmem_rlhf.cli import main

    sys.argv = ["lowmem-rlhf", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    text = out.getvalue()
    return {"code": code, "out": json.loads(text) if code == 0 else text, "err": err.getvalue()}


def main() -> None:
    profiles = command("profiles", "--json")["out"]
    for recipe in command("recipes", "--json")["out"]:
        for profile, card in profiles.items():
            memory = [] if card["memory_mib"] else ["--vram", CPU_MEMORY]
            made = command("plan", recipe, "--profile", profile, *memory, "--json")
            print(json.dumps({"recipe": recipe, "profile": profile, **made}), flush=True)


if __name__ == "__main__":
    main()
