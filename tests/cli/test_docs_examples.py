"""The Python examples of README and docs run as they stand, with fewer steps; those of a page one after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in path.read_text()
]
LEAVES = {  # what an example leaves: a name with what must hold of it, or a file
    "classification": lambda names, folder: (
        names["trainer"].progress.finished and (folder / "out/model.safetensors").is_file()
    ),
    "image-generation": lambda names, folder: names["images"].shape == (10, 1, 8, 8),
    "masked-text": lambda names, folder: names["written"].shape == (4, 64),
    "next-token": lambda names, folder: (folder / "plain/model.safetensors").is_file(),
    "looped": lambda names, folder: set(names["nats"]) == {"nats_at_1", "nats_at_4", "nats_at_16"},
    "python": lambda names, folder: names["output"].loss.item() > 0 and names["again"].num_blocks == 3,
}


def test_every_page_with_an_example_is_known():
    assert {path.stem for path in PAGES} == set(LEAVES)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in PAGES])
def test_the_examples_of_a_page_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for part in path.read_text().split("```python\n")[1:]:
        exec(re.sub(r"\bsteps=\d+", "steps=4", part.split("```")[0]), names)
    assert LEAVES[path.stem](names, tmp_path)
