"""Site build: pages and files outside docs/ join the site under their repository path, and links follow them."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("policies/README.md", "benchmarks/measured.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\s\"#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and every file that a page links to."""
    pages = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {target for page in pages for target in _targets(page) if (ROOT / target).is_file()}
    for path in sorted({*PAGES, *linked}):
        if not path.startswith("docs/") and path != "README.md":
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between repository paths to links between site paths."""
    here = page.file.src_uri if page.file.src_uri in PAGES else f"docs/{page.file.src_uri}"

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
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
