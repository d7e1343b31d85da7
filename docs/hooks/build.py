"""A hook of mkdocs: makes the pages of recipes, both references, and the first page of the README."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import keys
import python_api
import recipe_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"(!?\[[^\]]*\]\()((?!https?:|#|mailto:)[^)\s]+)(\))")
RECIPES, REST = "RECIPES", "REST"  # stand in mkdocs.yml for the pages of recipes, and for pages that nothing names


def generated() -> dict[str, str]:
    """Return the text of every page that is no file of docs/, by its place in the site."""
    pages = {f"recipes/{name}.md": text for name, text in recipe_pages.pages().items()}
    return {
        "index.md": _outside((ROOT / "README.md").read_text(encoding="utf-8"), ""),
        "keys.md": keys.page(),
        "api.md": python_api.page(),
        "changelog.md": _outside((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), ""),
        "contributing.md": _outside((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ""),
        **pages,
    }


def _outside(text: str, folder: str) -> str:
    """Return a file of the root with its links as seen from docs/."""

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        inside = target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"
        return f"{match[1]}{inside}{match[3]}"

    return _LINK.sub(moved, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of recipes, and those of docs/ that the navigation does not name, where it says."""
    rest = sorted({page.name for page in (ROOT / "docs").glob("*.md")} - set(_named(config.nav)))
    for part in config.nav or []:
        for title, pages in part.items():
            if pages == RECIPES:
                part[title] = [{name: f"recipes/{name}.md"} for name in recipe_pages.names()]
            elif REST in pages:
                at = pages.index(REST)
                part[title] = [*pages[:at], *rest, *pages[at + 1 :]]
    return config


def _named(nav: Any) -> list[str]:
    """Return the pages of a navigation."""
    if isinstance(nav, dict):
        return _named(list(nav.values()))
    return [name for one in nav for name in _named(one)] if isinstance(nav, list) else [str(nav)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to the repository, and to the site's own page where there is one."""
    here = Path(page.file.src_uri).parent
    up = "../" * len(here.parts)
    own = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}

    def led(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        levels = 1 + len(here.parts)
        if not path.startswith("../" * levels):
            return match[0]
        target = path.removeprefix("../" * levels)
        if target in own:
            return f"{match[1]}{up}{own[target]}{hash_}{anchor}{match[3]}"
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not in the repository")
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{match[1]}{config.repo_url}/{kind}/main/{target}{hash_}{anchor}{match[3]}"

    return re.sub(r"-->\n(?=\|)", "-->\n\n", _LINK.sub(led, markdown))  # a table begins after an empty line
