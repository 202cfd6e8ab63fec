"""The guide to adding a model quotes the program: what it shows has to be there, word for word."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding-a-model.md").read_text()
EXCERPTS = re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL)


def test_every_excerpt_names_its_file() -> None:
    assert len(EXCERPTS) == GUIDE.count("```python") > 5


@pytest.mark.parametrize(("file", "excerpt"), EXCERPTS)
def test_an_excerpt_stands_in_its_file(file: str, excerpt: str) -> None:
    assert excerpt in (ROOT / file).read_text()


def test_files_that_it_names_exist() -> None:
    named = set(re.findall(r"`((?:models|worker|tests)/[\w/]+\.py)`", GUIDE))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_worked_example_is_as_short_as_it_says() -> None:
    files = ("models/qwen3.py", "worker/models/qwen3.py")
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in files)
    assert f"have {lines} lines together" in GUIDE
    assert lines < 150
