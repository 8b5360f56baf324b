"""The house keeps its shape: imports point one way, the core stays light, seeds are stable."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import diffusionblocks
from diffusionblocks.seeds import derive

ROOT = Path(diffusionblocks.__file__).parent
# A room imports from itself and from rooms before it in this list (docs/architecture.md). "" is what lies in no room.
ROOMS = (
    "",
    "system",
    "theory",
    "networks",
    "blocks",
    "data",
    "training",
    "evaluation",
    "tasks",
    "recipes",
    "methods",
    "planning",
    "experiments",
    "report",
    "cli",
)


def room(module):
    """Of `diffusionblocks.ROOM.FILE`."""
    first = [*module.split("."), ""][1]
    return first if (ROOT / first).is_dir() else ""


def imports(path):
    """Full names of this package's modules that a file imports, wherever in it, in either form."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide which room they go to"
            for name in node.names:
                yield from [f"{node.module}.{name.name}"] if (node.module or "").startswith("diffusionblocks") else []
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("diffusionblocks"))


def test_imports_point_one_way():
    seen = 0
    for path in ROOT.rglob("*.py"):
        own = path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""
        for module in imports(path):
            assert ROOMS.index(room(module)) <= ROOMS.index(own), f"{path} must not import {module}"
            seen += 1
    assert seen > 500


def test_files_of_a_room_import_one_another_without_a_circle():
    graph = {}
    for path in ROOT.rglob("*.py"):
        name = "diffusionblocks." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name.removesuffix(".__init__")] = set(imports(path))
    for name, found in graph.items():
        graph[name] = {module if module in graph else module.rpartition(".")[0] for module in found} - {name}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_folder_is_a_room():
    assert {path.parent.name for path in ROOT.glob("*/*.py")} == set(ROOMS) - {""}


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
