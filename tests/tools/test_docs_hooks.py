"""Links of the documentation that leave docs/."""

from __future__ import annotations

import pytest

from tools.docs_hooks import outside_docs


@pytest.mark.parametrize(
    "target, page, path",
    [
        ("../deploy/compose.yaml", "operating.md", "deploy/compose.yaml"),
        ("../../CONTRIBUTING.md", "contributing/index.md", "CONTRIBUTING.md"),
        ("../results.md", "lab-notes/index.md", None),  # a page
        ("images/pool.svg", "how-it-works.md", None),
        ("https://docs.vllm.ai/en/latest", "security.md", None),
        ("../../outside", "index.md", None),  # of the repository too
    ],
)
def test_a_link_that_leaves_docs_is_a_path_in_the_repository(target: str, page: str, path: str | None) -> None:
    assert outside_docs(target, page) == path
