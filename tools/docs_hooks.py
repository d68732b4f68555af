"""A hook for MkDocs: pages may link to files of the repository outside docs/, as on a code host.

Such a file is copied into the site, under repository/, and the link is changed to the copy. Links to missing files are
left unchanged, so that MkDocs reports them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
COPIES = "repository"


def outside_docs(target: str, page: str) -> str | None:
    """The path in the repository of a link's target that lies outside docs/; None for all others.

    target: as written in the page; page: the page's path in docs/
    """
    if "://" in target or target.startswith(("/", "mailto:")):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith(("docs/", "..")) else path


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ at copies of the files, which join the site."""

    def replace(match: re.Match[str]) -> str:
        path = outside_docs(match[2], page.file.src_uri)
        if path is None or not (ROOT / path).is_file():
            return match[0]
        copy = f"{COPIES}/{path}{'.txt' if path.endswith('.md') else ''}"  # as plain text, not as a page
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
        return f"{match[1]}{posixpath.relpath(copy, posixpath.dirname(page.file.src_uri) or '.')}{match[3]}"

    return LINK.sub(replace, markdown)
