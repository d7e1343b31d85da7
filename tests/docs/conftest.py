"""What makes the pages of the site is imported from docs/hooks."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "docs" / "hooks"))
