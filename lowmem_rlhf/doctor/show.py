"""What `doctor` prints for people."""

import shutil
import textwrap

from lowmem_rlhf.doctor.finding import Finding, worst
from lowmem_rlhf.plain_text import harmless

LEAST, MOST = 60, 120  # columns
_INDENT = " " * 9


def print_findings(findings: list[Finding]) -> None:
    """Print each finding with what it means and what mends it, then how many are to be mended."""
    width = max(LEAST, min(MOST, shutil.get_terminal_size().columns))
    for one in findings:
        print(_wrapped(f"{one.status:8} {one.check}: {one.found}", width))
        if one.means:
            print(_wrapped(f"{_INDENT}{one.means}", width))
        if one.command:
            print(harmless(f"{_INDENT}$ {one.command}"))  # in one piece, to be copied
    print(summary(findings))


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(
        harmless(text), width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
    )


def summary(findings: list[Finding]) -> str:
    """Return one line on all findings."""
    errors = sum(one.status == "error" for one in findings)
    warnings = sum(one.status == "warning" for one in findings)
    if worst(findings) == "ok":
        return "nothing to mend"
    parts = [
        f"{count} {word}{'s' if count != 1 else ''}"
        for count, word in ((errors, "error"), (warnings, "warning"))
        if count
    ]
    return f"{', '.join(parts)}; for a report of a bug: lowmem-rlhf doctor --json"
