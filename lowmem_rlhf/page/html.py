"""The page as one HTML text: the report of a run, or what `lowmem-rlhf watch` serves.

Everything that it needs is in it. Its content policy allows its own style and scripts by their hash and nothing else:
no other host is asked for anything, and a script that came with a run would not be executed. What is shown of a run
stands in the page as JSON, and its scripts (``assets/``) put it there as text.
"""

import base64
import hashlib
import json
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
# In this order: each may use what stands in those before it.
SCRIPTS = ("dom", "format", "metrics", "diff", "sections", "source", "charts", "bars", "samples", "watch", "page")
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M1 14 6 8l3 3 6-9' "
    "fill='none' stroke='%230b62b0' stroke-width='2'/%3E%3C/svg%3E"
)


def whole_page(data: dict[str, Any] | None, token: str | None = None) -> tuple[str, str]:
    """Return the page and its content policy, which a server sends as a header; a report has it in itself.

    Args:
        data: what `page.report_data` gives, for a report; None: the page of `watch`, which asks its server.
        token: of that server.
    """
    style, scripts, body = _assets()
    policy = "; ".join((
        "default-src 'none'",
        f"script-src {' '.join(map(_digest, scripts))}",
        f"style-src {_digest(style)}",
        "img-src data:",
        *(["connect-src 'self'"] if data is None else []),
        "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip
    name = "lowmem_rlhf" if data is None else f"{data['run'].get('name') or 'run'} · lowmem_rlhf"
    meta = "" if data is None else f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    given = _json({"token": token} if data is None else data)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{meta}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(name)}</title>\n<link rel="icon" href="{_ICON}">\n<style>{style}</style>\n</head>\n<body>\n'
        f'{body}<script type="application/json" id="data">{given}</script>\n'
        f"{''.join(f'<script>{script}</script>{chr(10)}' for script in scripts)}</body>\n</html>\n"
    )
    return page, policy


@cache
def _assets() -> tuple[str, tuple[str, str], str]:
    """Return the style, the scripts (the charting library with its licence, and ours) and the body."""
    library = f"/*\n{_read('uplot/LICENSE')}*/\n{_read('uplot/uPlot.iife.min.js')}"
    ours = "\n".join(_read(f"{name}.js") for name in SCRIPTS)
    style = f"{_read('uplot/uPlot.min.css')}\n{_read('page.css')}"
    return style, (library, f'(() => {{\n"use strict";\n{ours}}})();\n'), _read("page.html")


def _read(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """Return what a content policy calls a script or style of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """Return JSON that can stand in a script element: no tag begins in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # a lone surrogate (half of a character) cannot be written as UTF-8, and its escape can
    return text.replace("<", "\\u003c").encode("utf-8", "backslashreplace").decode()
