"""What a report.html says. Not a test module."""

import json
import re
from pathlib import Path
from typing import Any


def data_of(report: Path) -> dict[str, Any]:
    """Return what a report has in itself of its run (see `lowmem_rlhf.page.report_data`)."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', report.read_text(encoding="utf-8"))
    assert len(found) == 1
    return json.loads(found[0])
