"""The house keeps its shape: imports point one way, the core stays light, seeds are stable."""

import graphlib
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

import diffusionblocks
from diffusionblocks.seeds import derive

ROOT = Path(diffusionblocks.__file__).parent
DOCS = Path(__file__).parents[2] / "docs"
rooms = SourceFileLoader("rooms", str(DOCS / "rooms.py")).load_module()
ORDER = list(rooms.ROOMS)  # a room imports from itself and from rooms before it


def test_imports_point_one_way():
    seen = 0
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
        for module in rooms.imports(path):
            room = rooms.room_of(module, ROOT)
            assert ORDER.index(room) <= ORDER.index(own), f"{path} must not import {module}"
            seen += 1
    assert seen > 500


def test_both_forms_of_import_are_seen(tmp_path):
    path = tmp_path / "file.py"
    path.write_text("from diffusionblocks import cli\ndef f():\n    import diffusionblocks.report.page\n")
    assert list(rooms.imports(path)) == ["diffusionblocks.cli", "diffusionblocks.report.page"]
    assert [rooms.room_of(module, ROOT) for module in rooms.imports(path)] == ["cli", "report"]
    path.write_text("from . import cli\n")
    with pytest.raises(ValueError, match="a relative import"):
        list(rooms.imports(path))


def test_files_import_one_another_without_a_circle():
    graph = {}
    for path in ROOT.rglob("*.py"):
        name = "diffusionblocks." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = set(rooms.imports(path))
    for name, found in graph.items():
        graph[name] = {module if module in graph else module.rpartition(".")[0] for module in found} - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_folder_is_a_room():
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(ORDER) - {""}


def test_the_diagram_is_that_of_the_code():
    page = (DOCS / "architecture.md").read_text()
    assert rooms.drawn(page) == page, "run python docs/rooms.py"


def test_importing_the_package_loads_torch_alone_and_fast():
    code = (
        "import torch, sys, time; start = time.perf_counter(); import diffusionblocks; "
        "diffusionblocks.convert, diffusionblocks.Partition; seconds = time.perf_counter() - start; "
        "heavy = [m for m in ('transformers', 'accelerate', 'matplotlib', 'sklearn', 'rich', 'kornia') "
        "if m in sys.modules]; print(seconds, heavy)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.strip().split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 3.0


def test_nothing_is_unpickled():
    text = "".join(path.read_text() for path in ROOT.rglob("*.py"))
    assert "torch.load" not in text
    assert "pickle" not in text.replace("unpickled", "")


def test_derived_seeds_are_stable_and_distinct():
    assert derive(0, "step", 1, 2) == 7986440277878847354  # a change would break resuming old runs
    assert len({derive(s, "step", b, i) for s in range(3) for b in range(3) for i in range(50)}) == 450


def test_a_task_is_imported_without_the_others():
    code = (
        "import sys, diffusionblocks; diffusionblocks.Classification; "
        "print([m for m in sys.modules if m.startswith('diffusionblocks.tasks.')], 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['diffusionblocks.tasks.classification'] False"
