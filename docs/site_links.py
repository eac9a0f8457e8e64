"""Site build: pages and files outside docs/ join the site under their repository path, and links follow them."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: name for name in ("policies/README.md", "benchmarks/measured.md", "CONTRIBUTING.md", "CHANGELOG.md")}
PAGES["README.md"] = "getting-started.md"  # the site reads README.md of a folder as its index
LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\s\"#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and every file that a page links to."""
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {target for page in pages for target in _targets(page) if (ROOT / target).is_file()}
    for path in sorted({*PAGES, *linked}):
        if not path.startswith("docs/"):
            files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between repository paths to links between site paths."""
    outside = {site: path for path, site in PAGES.items()}
    here = outside.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(found: re.Match[str]) -> str:
        target = _resolve(here, found[2])
        if "://" in found[2] or not (ROOT / target).exists():
            return found[0]
        return found[1] + posixpath.relpath(_on_site(target), posixpath.dirname(_on_site(here)) or ".")

    return LINK.sub(moved, markdown)


def _targets(page: str) -> set[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return {_resolve(page, link) for _, link in LINK.findall(text) if "://" not in link}


def _resolve(page: str, link: str) -> str:
    return os.path.normpath(posixpath.join(posixpath.dirname(page), link))


def _on_site(path: str) -> str:
    return PAGES.get(path, path.removeprefix("docs/"))
