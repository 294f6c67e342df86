"""The tables of scores in docs/ are those of the committed reports."""

import re
from pathlib import Path

import pytest

from benchmarks import synthetic

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", synthetic.EXAMPLES)
def test_a_page_shows_the_committed_scores(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    seeds = re.search(r"\| SYNTHETIC: AUC, (\d+) seeds \|", page)
    assert seeds is not None
    assert int(seeds[1]) >= 3
    assert synthetic.filled(name) == page
