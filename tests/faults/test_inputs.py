"""Wrong options, values, recipes, data and arguments, of every command: exit code 2 and one line that helps.

The table below is also docs/errors.md. After it come the wrong values that are made from the types of all options.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.options import key_of, limits_of
from diffusionblocks.recipes import ModelConfig
from diffusionblocks.recipes.schema import InContextConfig, LoraConfig
from diffusionblocks.tasks import TASKS
from diffusionblocks.training.config import TrainingConfig
from tests.faults.harness import SHORT, Fault, call, documented, few, files, nothing_half_written, nothing_lost, obeys

MATRIX = "bad inputs"
TEXT = [
    "--model.hidden-size=8", "--model.num-hidden-layers=3", "--model.num-attention-heads=2",
    "--model.intermediate-size=16", "--steps=2", "--batch-size=4", "--data.length=16", "--evaluation.num-samples=0",
]  # fmt: skip
IMAGES = [*SHORT, "--data.image-size=8", "--num-blocks=3"]
SPEAK = ["adapt", "@net", "--data.path=@texts", "--data.general=", "--steps=2", "--batch-size=4", "--data.length=16"]
Files = Callable[[Path], None]


@dataclass(frozen=True)
class Input:
    """One wrong input. `@run`, `@adapted`, `@net`, `@texts` and `@here` in arguments are folders; files: written into
    @here before."""

    group: str
    what: str
    arguments: tuple[str, ...]
    files: Files | None = None
    codes: tuple[int, ...] = (2,)
    row: bool = True  # of docs/errors.md

    def __str__(self) -> str:
        return f"{self.group}: {self.what}"


def _train(what: str, *arguments: str, files: Files | None = None, **options: Any) -> Input:
    return Input("train", what, ("train", "digits", *SHORT, "--output-dir=@here/run", *arguments), files, **options)


def _yaml(what: str, text: str | bytes, **options: Any) -> Input:
    """A recipe file."""
    content = text if isinstance(text, bytes) else text.encode()
    arguments = ("train", "@here/recipe.yaml", *SHORT, "--output-dir=@here/run")
    return Input("recipes", what, arguments, lambda here: _write(here / "recipe.yaml", content), **options)


def _images(what: str, make: Files, *arguments: str, **options: Any) -> Input:
    command = ("train", "images", *IMAGES, "--data.path=@here/data", "--output-dir=@here/run", *arguments)
    return Input("images", what, command, make, **options)


def _texts(what: str, make: Files, name: str, *arguments: str, **options: Any) -> Input:
    command = ("train", "lm-folder", *TEXT, f"--data.path=@here/{name}", "--output-dir=@here/run", *arguments)
    return Input("text", what, (*command, "--data.cache-dir=@here/cache"), make, **options)


def _of(group: str, what: str, *arguments: str, **options: Any) -> Input:
    return Input(group, what, arguments, **options)


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _rows(*rows: object, name: str = "data.jsonl") -> Files:
    return lambda here: _write(here / name, "".join(json.dumps(row) + "\n" for row in rows))


def _classes(extra: Files) -> Files:
    """Two classes of good images, and what `extra` makes of them."""

    def make(here: Path) -> None:
        for label in range(2):
            (here / "data" / str(label)).mkdir(parents=True)
            for index in range(12):
                array = np.full((8, 8), 20 * index + label, dtype=np.uint8)
                Image.fromarray(array).save(here / "data" / str(label) / f"{index}.png")
        extra(here / "data" / "0")

    return make


def _bomb(folder: Path) -> None:
    """A PNG of a few kB that says it has 900 million pixels."""
    Image.new("1", (30000, 30000)).save(folder / "bomb.png")


def _fifo(folder: Path) -> None:
    import os

    os.mkfifo(folder / "fifo.png")


def _eps(folder: Path) -> None:
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    _write(folder / "a.png", head + "(/tmp/never) (w) file closefile showpage\n%%EOF\n")


def _parquet(change: Callable[[bytes], bytes], column: Any = None) -> Files:
    def make(here: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        values = column if column is not None else [f"text {number} " * 20 for number in range(50)]
        parquet.write_table(pa.table({"text": values}), here / "data.parquet")
        _write(here / "data.parquet", change((here / "data.parquet").read_bytes()))

    return make


def _pages(content: bytes) -> bytes:
    """Its first page is damaged, its footer not."""
    return content[:8] + bytes(byte ^ 0x5A for byte in content[8:120]) + content[120:]


def _network(change: Callable[[Path], None]) -> Files:
    """A pretrained network in @here/net that is changed."""

    def make(here: Path) -> None:
        from tests.language_models import make_pretrained

        make_pretrained(here / "net", layers=2)
        change(here / "net")

    return make


def _cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return change


def _nan_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    found = load_file(str(folder / "model.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in found.items()}, str(folder / "model.safetensors"))


ANCHORS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
OWN = ("adapt", "@here/net", "--data.path=@texts", "--data.general=", "--steps=2", "--batch-size=4", "--data.length=16")
OWN += ("--output-dir=@here/run",)

TABLE: tuple[Input, ...] = (
    # ------------------------------------------------------------ the command line itself
    _of("commands", "an unknown command", "trian"),
    _of("commands", "an unknown option of dblocks", "--nope"),
    _of("commands", "train without a recipe", "train"),
    _of("commands", "two recipes", "train", "digits", "mnist"),
    _of("commands", "a setting without dashes", "train", "digits", "train.steps=3"),
    _of("commands", "recipes with an argument", "recipes", "digits"),
    _of("commands", "an empty command", "", row=False),
    _of("commands", "evaluate without a folder", "evaluate"),
    _of("commands", "report without a folder", "report"),
    _of("commands", "a value for --json", "recipes", "--json=yes"),
    _of("commands", "--resume with an unknown value", "train", "digits", "--resume", "maybe"),
    _of("commands", "an option that belongs to another command", "report", "@run", "--num", "3"),
    _of("commands", "only dashes", "train", "digits", "--", "x", row=False),
    _of("commands", "an option with an empty name", "train", "digits", "--=3"),
    _of("commands", "an option of dots", "train", "digits", "--...=3"),
    _of("commands", "a NUL byte in a path", "evaluate", "a\0b"),
    _of("commands", "a path of 5,000 characters", "evaluate", "a" * 5000, row=False),
    _of("commands", "a lone surrogate", "evaluate", "\udcff", row=False),
    # ------------------------------------------------------------ train: options
    _train("an unknown option", "--train.learning-rat=0.1"),
    _train("an unknown group", "--trian.steps=3"),
    _train("a group as a value", "--train=3"),
    _train("a value as a group", "--train.steps.more=3"),
    _train("steps 0", "--steps=0"),
    _train("steps -3", "--steps=-3"),
    _train("steps 1.5", "--steps=1.5"),
    _train("steps that are no number", "--steps=many"),
    _train("steps null", "--train.steps=null"),
    _train("steps true", "--steps=true"),
    _train("steps without a value", "--steps"),
    _train("batch-size 0", "--batch-size=0"),
    _train("a batch larger than the data", "--batch-size=100000"),
    _train("a learning rate of 0", "--train.learning-rate=0", codes=(0, 2), row=False),
    _train("a negative learning rate", "--train.learning-rate=-0.1"),
    _train("learning rate nan", "--train.learning-rate=nan"),
    _train("learning rate .nan", "--train.learning-rate=.nan"),
    _train("learning rate inf", "--train.learning-rate=inf"),
    _train("a learning rate at which training diverges", "--train.learning-rate=1e30", codes=(1, 2)),
    _train("negative weight decay", "--train.weight-decay=-1"),
    _train("warmup 5", "--train.warmup=5"),
    _train("warmup -1", "--train.warmup=-1"),
    _train("warmup nan", "--train.warmup=nan"),
    _train("hold 2", "--train.hold=2"),
    _train("hold -0.5", "--train.hold=-0.5"),
    _train("negative max-grad-norm", "--train.max-grad-norm=-1"),
    _train("max-grad-norm nan", "--train.max-grad-norm=nan"),
    _train("three betas", "--train.betas=[0.9,0.99,0.999]"),
    _train("betas of 1", "--train.betas=[1.0,1.0]"),
    _train("betas as text", "--train.betas=abc"),
    _train("accumulation 0", "--train.accumulation=0"),
    _train("an accumulation that is no divisor", "--train.accumulation=3", codes=(0, 2), row=False),
    _train("an unknown optimizer", "--train.optimizer=adam"),
    _train("an unknown order", "--order=swep"),
    _train("an unknown residency", "--residency=gpu"),
    _train("an unknown schedule", "--train.learning-rate-schedule=linear"),
    _train("an unknown precision", "--train.precision=fp16"),
    _train("an unknown device", "--device=tpu"),
    _train("a card that is not there", "--device=cuda:7", row=False),
    _train("order backward for blocks that cannot", "--order=backward"),
    _train("a block that is not there", "--train.blocks=7"),
    _train("block -1", "--train.blocks=-1"),
    _train("a block twice", "--train.blocks=0,0"),
    _train("visit-steps 0", "--train.visit-steps=0"),
    _train("keep-checkpoints 0", "--train.keep-checkpoints=0"),
    _train("negative checkpoint-every", "--train.checkpoint-every=-1"),
    _train("negative log-every", "--train.log-every=-1"),
    _train("num-workers -1", "--train.num-workers=-1"),
    _train("ema-decay 1.5", "--train.ema-decay=1.5"),
    _train("ema-decay 1", "--train.ema-decay=1"),
    _train("ema-decay nan", "--train.ema-decay=nan"),
    _train("branch-at 2", "--train.branch-at=2"),
    _train("a branch-at for each border", "--train.branch-at=[0.9,0.1]"),
    _train("own-batch -1", "--train.own-batch=-1"),
    _train("a setting of an earlier version", "--train.own-rate=0.5"),
    _train("kept graphs of parts of a batch", "--train.keep-graphs=2", "--train.accumulation=2"),
    _train("heads-first 2", "--local.heads-first=2"),
    _train("seed -1", "--seed=-1", codes=(0, 2), row=False),
    _train("a seed of 30 digits", "--seed=123456789012345678901234567890", codes=(0, 2), row=False),
    _train("a seed that is no number", "--seed=lucky"),
    _train("an unknown preset", "--preset=papr"),
    _train("preset 5", "--preset=5"),
    _train("an unknown method", "--method=end2end"),
    _train("method null", "--method=null"),
    _train("methods null", "--methods=null", row=False),
    _train("an unknown evaluate-on", "--evaluate-on=train"),
    _train("a name with a slash", "--name=../../outside"),
    _train("a name ..", "--name=.."),
    _train("an empty name", "--name=", row=False, codes=(0, 2)),
    _train("the option twice", "--train.hold=0.1", "--train.hold=0.2", codes=(0, 2), row=False),
    # ------------------------------------------------------------ train: network and blocks
    _train("num-blocks 0", "--num-blocks=0"),
    _train("more blocks than layers", "--num-blocks=9"),
    _train("num-blocks -2", "--num-blocks=-2"),
    _train("layers-per-block that do not add up", "--blocks.layers-per-block=1,1"),
    _train("layers-per-block with 0", "--blocks.layers-per-block=0,1,2"),
    _train("hidden-size 0", "--model.hidden-size=0"),
    _train("a hidden size that heads do not divide", "--model.hidden-size=9"),
    _train("num-attention-heads 0", "--model.num-attention-heads=0"),
    _train("num-hidden-layers 0", "--model.num-hidden-layers=0"),
    _train("intermediate-size 0", "--model.intermediate-size=0"),
    _train("patch-size 0", "--model.patch-size=0"),
    _train("a patch larger than the image", "--model.patch-size=16"),
    _train("a patch that does not divide the image", "--model.patch-size=3"),
    _train("dropout 2", "--model.dropout=2"),
    _train("dropout nan", "--model.dropout=nan"),
    _train("an unknown attention", "--model.attention=flash9"),
    _train("an unknown model class", "--model.model-class=ResNet50"),
    _train("a class of another kind", "--model.model-class=LlamaForCausalLM"),
    _train("an unknown context", "--blocks.context=output"),
    _train("an unknown readout", "--blocks.readout=softmax"),
    _train("sigma-min above sigma-max", "--noise.sigma-min=90"),
    _train("sigma-min 0", "--noise.sigma-min=0"),
    _train("sigma-max nan", "--noise.sigma-max=nan"),
    _train("overlap 2", "--noise.overlap=2"),
    _train("overlap -1", "--noise.overlap=-1"),
    _train("least-hidden 1", "--noise.least-hidden=1"),
    _train("least-hidden -1", "--noise.least-hidden=-1"),
    _train("condition-width -1", "--blocks.condition-width=-1"),
    _train("head-layers -1", "--local.head-layers=-1"),
    _train("label-smoothing 5", "--objective.label-smoothing=5"),
    _train("an unknown kind of task", "--task.kind=classify"),
    _train("an unknown sampler", "--sampling.sampler=magic"),
    _train("sampling-steps -1", "--sampling.steps=-1"),
    _train("a start that is not there", "--model.start=@here/nothing"),
    _train("a start of another network", "--model.start=@adapted"),
    _train("a pretrained folder that is not there", "--model.pretrained=@here/nothing"),
    _train("a pretrained empty folder", "--model.pretrained=@here/data", files=lambda here: (here / "data").mkdir()),
    # ------------------------------------------------------------ train: where
    _of("places", "a run with another configuration", "train", "digits", *SHORT, "--seed=1", "--output-dir=@run"),
    _train("an output folder that is a file", "--output-dir=@here/data", files=lambda here: _write(here / "data", "x")),
    _train("an output folder below a file", "--output-dir=@here/data/x", files=lambda here: _write(here / "data", "x")),
    _train("an output folder below /proc", "--output-dir=/proc/run"),
    _train("an output folder below /sys", "--output-dir=/sys/run", row=False),
    _train("an output folder with other files", "--output-dir=@here/d", files=lambda here: _write(here / "d/x", "x")),
    _train("a name that is too long", "--output-dir=@here/" + "x" * 300, row=False),
    _train("an output folder with a NUL byte", "--output-dir=@here/a\0b", row=False),
    _train(
        "--resume never on a folder that is no run", "--resume=never", "--output-dir=@here/d",
        files=lambda here: _write(here / "d/model/mine.txt", "x"),
    ),
    _of("places", "evaluate where there is no folder", "evaluate", "@here/nothing"),
    _of("places", "evaluate of a file", "evaluate", "@run/config.yaml"),
    _of("places", "sample of an empty folder", "sample", "@here"),
    _of("places", "export where there is no run", "export", "@here", "--block=0"),
    _of("places", "report of a folder that is no run", "report", "@here"),
    _of("places", "report to a folder", "report", "@run", "--output=@here"),
    _of("places", "report below a file", "report", "@run", "--output=@run/config.yaml/x.html"),
    _of("places", "report below /proc", "report", "@run", "--output=/proc/x.html"),
    _of("places", "sample below a file", "sample", "@adapted", "--num=1", "--output=@run/config.yaml/x"),
    _of("places", "sample of classes below a file", "sample", "@run", "--num=1", "--output=@run/config.yaml/x"),
    _of("places", "sample to a folder", "sample", "@run", "--num=1", "--output=@here"),
    _of("places", "export of a block below a file", "export", "@run", "--block=0", "--output=@run/config.yaml/x"),
    _of("places", "export of a block to a folder", "export", "@run", "--block=0", "--output=@here"),
    _of("places", "export below a file", "export", "@adapted", "--output=@run/config.yaml/x"),
    _of("places", "export to a file", "export", "@adapted", "--output=@run/config.yaml"),
    _of("places", "compare on a file", "compare", "digits", *SHORT, "--output-dir=@run/config.yaml"),
    # ------------------------------------------------------------ evaluate, sample, export
    _of("evaluate", "a setting that cannot change", "evaluate", "@run", "--train.steps=3"),
    _of("evaluate", "an unknown setting", "evaluate", "@run", "--task.samplr=euler"),
    _of("evaluate", "the wrong split", "evaluate", "@run", "--evaluate-on=all"),
    _of("evaluate", "an unknown device", "evaluate", "@run", "--device=tpu", row=False),
    _of("evaluate", "an unknown task of the harness", "evaluate", "@adapted", "--harness=nope", row=False),
    _of("evaluate", "a negative --harness-limit", "evaluate", "@adapted", "--harness=a", "--harness-limit=-1",
        row=False),
    _of("sample", "--num 0", "sample", "@run", "--num=0"),
    _of("sample", "--num -1", "sample", "@run", "--num=-1"),
    _of("sample", "--num that is no number", "sample", "@run", "--num=few"),
    _of("sample", "--prompt for classes", "sample", "@run", "--prompt=Hello"),
    _of("sample", "--class for classes", "sample", "@run", "--class=1", row=False),
    _of("sample", "--guidance for text", "sample", "@adapted", "--guidance=2"),
    _of("sample", "a negative temperature", "sample", "@adapted", "--temperature=-1"),
    _of("sample", "temperature nan", "sample", "@adapted", "--temperature=nan"),
    _of("sample", "temperature inf", "sample", "@adapted", "--temperature=inf", codes=(0, 2), row=False),
    _of("sample", "--top-p 0", "sample", "@adapted", "--top-p=0"),
    _of("sample", "--top-p 2", "sample", "@adapted", "--top-p=2"),
    _of("sample", "--top-k -1", "sample", "@adapted", "--top-k=-1"),
    _of("sample", "a --length that is too long", "sample", "@adapted", "--length=100000"),
    _of("sample", "--length -1", "sample", "@adapted", "--length=-1"),
    _of("sample", "a prompt that is longer than --length", "sample", "@adapted", "--prompt=" + "a " * 90, "--length=4"),
    _of("sample", "--stop with a lone backslash", "sample", "@adapted", "--num=1", "--stop=\\", codes=(0, 2),
        row=False),
    _of("sample", "an empty --stop", "sample", "@adapted", "--num=1", "--stop=", codes=(0, 2), row=False),
    _of("sample", "--stream and --num 3", "sample", "@adapted", "--num=3", "--stream"),
    _of("sample", "a blank in the prompt of a model that cannot fill it", "sample", "@adapted", "--num=1",
        "--prompt=a {5} b", codes=(0, 2), row=False),
    _of("sample", "a huge blank in the prompt", "sample", "@adapted", "--num=1", "--prompt={" + "9" * 400 + "}",
        codes=(0, 2), row=False),
    _of("sample", "a lone surrogate in the prompt", "sample", "@adapted", "--num=1", "--prompt=\udcff", codes=(0, 2),
        row=False),
    _of("sample", "--iterations for a network without a loop", "sample", "@adapted", "--iterations=3"),
    _of("sample", "seed -1", "sample", "@adapted", "--num=1", "--seed=-1", codes=(0, 2), row=False),
    _of("sample", "an unknown option", "sample", "@run", "--nmu=3"),
    _of("export", "a block that is not there", "export", "@run", "--block=9"),
    _of("export", "block -1", "export", "@run", "--block=-1"),
    _of("export", "a block that is no number", "export", "@run", "--block=first"),
    _of("export", "denoisers as an ordinary network", "export", "@run"),
    # ------------------------------------------------------------ compare, plan, adapt
    _of("compare", "a method twice", "compare", "digits", *SHORT, "--methods=shallow,shallow", "--output-dir=@here/c"),
    _of("compare", "an unknown method", "compare", "digits", *SHORT, "--methods=shalow", "--output-dir=@here/c"),
    _of("compare", "no method", "compare", "digits", *SHORT, "--methods=,", "--output-dir=@here/c"),
    _of("compare", "seeds 0", "compare", "digits", *SHORT, "--seeds=0", "--output-dir=@here/c"),
    _of("compare", "jobs 0", "compare", "digits", *SHORT, "--jobs=0", "--output-dir=@here/c"),
    _of("compare", "an unknown budget", "compare", "digits", *SHORT, "--budget=time", "--output-dir=@here/c"),
    _of("compare", "an unknown recipe", "compare", "digit"),
    _of("compare", "a wrong setting", "compare", "digits", *SHORT, "--steps=0", "--output-dir=@here/c"),
    _of("plan", "neither a recipe nor a model", "plan"),
    _of("plan", "a recipe and a model", "plan", "digits", "--model=@net"),
    _of("plan", "memory without a number", "plan", "digits", "--memory=big"),
    _of("plan", "memory 0", "plan", "digits", "--memory=0"),
    _of("plan", "negative memory", "plan", "digits", "--memory=-3GiB"),
    _of("plan", "memory nan", "plan", "digits", "--memory=nanGiB"),
    _of("plan", "an unknown unit", "plan", "digits", "--memory=3lb"),
    _of("plan", "numbers of blocks that are none", "plan", "digits", "--num-blocks=two"),
    _of("plan", "0 blocks", "plan", "digits", *SHORT[:6], "--num-blocks=0"),
    _of("plan", "a model that is not there", "plan", "--model=@here/nothing"),
    _of("adapt", "no data", "adapt", "@net"),
    _of("adapt", "a model that is not there", "adapt", "@here/nothing", "--data.path=@texts"),
    _of("adapt", "a .gguf file that is none", "adapt", "@here/x.gguf", "--data.path=@texts",
        files=lambda here: _write(here / "x.gguf", b"GGUF" + bytes(40))),
    _of("adapt", "a package that is not installed", "adapt", "package:nope", "--data.path=@texts"),
    _of("adapt", "lora of rank 0", *SPEAK, "--method=lora", "--lora.rank=0", "--output-dir=@here/run"),
    _of("adapt", "damaged weights", *OWN, files=_network(_cut("model.safetensors"))),
    _of("adapt", "weights that are empty", *OWN, files=_network(_cut("model.safetensors", 0))),
    _of("adapt", "weights that are NaN", *OWN, codes=(1, 2), files=_network(_nan_weights)),
    _of("adapt", "a config.json that is cut", *OWN, files=_network(_cut("config.json"))),
    _of("adapt", "a tokenizer.json that is cut", *OWN, files=_network(_cut("tokenizer.json"))),
    _of("adapt", "no tokenizer", *OWN, files=_network(
        lambda folder: [path.unlink() for path in folder.glob("*token*")]  # type: ignore[func-returns-value]
        and None)),
    # ------------------------------------------------------------ recipes
    _of("recipes", "an unknown recipe", "train", "digts"),
    _of("recipes", "a file that is not there", "train", "@here/nothing.yaml"),
    _of("recipes", "a folder", "train", "@here/d.yaml", files=lambda here: (here / "d.yaml").mkdir()),
    _yaml("an empty file", "", codes=(2,)),
    _yaml("a list", "- a\n- b\n"),
    _yaml("a text", "just words"),
    _yaml("broken YAML", "train: {steps: 3"),
    _yaml("tabs", "train:\n\tsteps: 3\n"),
    _yaml("no UTF-8", b"name: \xff\xfe\xfa\n"),
    _yaml("NUL bytes", b"name: a\0b\n"),
    _yaml("an unknown key", "trian: {steps: 3}\n"),
    _yaml("a key twice", "train: {steps: 3}\ntrain: {steps: 4}\n"),
    _yaml("a key twice in a group", "train:\n  steps: 3\n  steps: 4\n"),
    _yaml("anchors", "train: &x {steps: 3}\nblocks: *x\n"),
    _yaml("a Python object", "name: !!python/object/apply:os.system ['true']\n"),
    _yaml("an unknown tag", "name: !thing 3\n"),
    _yaml("two documents", "name: a\n---\nname: b\n"),
    _yaml("a number as a key", "3: 4\n"),
    _yaml("a list as a key", "? [a, b]\n: 3\n"),
    _yaml("a group that is a number", "train: 3\n"),
    _yaml("a group that is null", "train: null\n"),
    _yaml("a number with a leading zero", "train: {steps: 012}\n"),
    _yaml("a name with a slash", "name: ../../outside\n"),
    _yaml("presets that are a list", "presets: [a]\n"),
    _yaml("methods that are a text", "methods: all\n"),
    _yaml("methods of an unknown method", "methods: {nope: {train: {steps: 3}}}\n", codes=(0, 2), row=False),
    _yaml("a method's changes that are a number", "methods: {shallow: 3}\n"),
    _yaml("an unknown kind of task", "task: {kind: [a]}\n"),
    _yaml("a task that is a list", "task: [a]\n"),
    _yaml("10,000 brackets", "train: " + "[" * 10000 + "]" * 10000 + "\n"),
    _yaml("a merge key", "train: {<<: {steps: 3}}\n", codes=(0, 2), row=False),
    _yaml("a file of 20 MB", "description: " + "x" * 20_000_000 + "\n", row=False),
    # ------------------------------------------------------------ images
    _images("a folder that is not there", lambda here: None),
    _images("a file", lambda here: _write(here / "data", "x")),
    _images("an empty folder", lambda here: (here / "data").mkdir()),
    _images("one class", lambda here: (here / "data" / "only").mkdir(parents=True)),
    _images("a class without images", _classes(
        lambda folder: [path.unlink() for path in folder.iterdir()] and None)),  # type: ignore[func-returns-value]
    _images("an empty image", _classes(lambda folder: _write(folder / "a.png", ""))),
    _images("an image that is text", _classes(lambda folder: _write(folder / "a.png", "hello"))),
    _images("an image that is cut", _classes(_cut("3.png"))),
    _images("a decompression bomb", _classes(_bomb)),
    _images("a link to nowhere", _classes(lambda folder: (folder / "a.png").symlink_to("nowhere"))),
    _images("a FIFO", _classes(_fifo)),
    _images("PostScript named .png", _classes(_eps)),
    _images("a folder named a.png", _classes(lambda folder: (folder / "a.png").mkdir()), codes=(0, 2), row=False),
    _images("unreadable images only",
        _classes(lambda folder: [path.write_text("x") for path in folder.iterdir()] and None),
        "--data.skip-unreadable=true"),
    _images("a class named $\\foo$", _classes(lambda folder: folder.rename(folder.with_name("$\\foo$")) and None),
        codes=(0,), row=False),
    _train("image-size 0", "--data.image-size=0"),
    _train("channels 2", "--data.channels=2"),
    _train("test-share 2", "--data.test-share=2"),
    _train("test-share 0", "--data.test-share=0"),
    _train("validation-share nan", "--data.validation-share=nan"),
    _train("an unknown source", "--data.source=digit"),
    _train("an unknown augmentation", "--data.augment=blur"),
    # ------------------------------------------------------------ text
    _texts("a folder that is not there", lambda here: None, "data"),
    _texts("an empty folder", lambda here: (here / "data").mkdir(), "data"),
    _texts("an empty file", lambda here: _write(here / "data.txt", ""), "data.txt"),
    _texts("too little text", lambda here: _write(here / "data.txt", "short"), "data.txt"),
    _texts("no UTF-8", lambda here: _write(here / "data.txt", b"ok " * 900 + b"\xff"), "data.txt"),
    _texts("a line that is no JSON", lambda here: _write(here / "data.jsonl", '{"text": "a"}\nnope\n'), "data.jsonl"),
    _texts("a row that is a list", _rows({"text": "a"}, [1]), "data.jsonl"),
    _texts("a row that is null", _rows({"text": "a"}, None), "data.jsonl"),
    _texts("a text that is a number", _rows({"text": 5}), "data.jsonl"),
    _texts("a text that is null", _rows({"text": "a"}, {"text": None}), "data.jsonl"),
    _texts("a row without the column", _rows({"text": "a"}, {"txt": "b"}), "data.jsonl"),
    _texts("no such column", _rows({"text": "a b c " * 40}), "data.jsonl", "--data.text-key=body"),
    _texts("a lone surrogate", _rows({"text": "a \ud800 b " * 60}), "data.jsonl", codes=(0, 2)),
    _texts("messages that are a text", _rows({"messages": "hello"}), "data.jsonl", "--data.format=messages"),
    _texts("messages without a role", _rows({"messages": [{"content": "a"}]}), "data.jsonl", "--data.format=messages"),
    _texts("messages of a tokenizer without a template", _rows({"messages": [{"role": "user", "content": "a"}]}),
        "data.jsonl"),
    _texts("a parquet file that is none", lambda here: _write(here / "data.parquet", b"PAR1nope"), "data.parquet"),
    _texts("a parquet file that is cut", _parquet(lambda content: content[:-30]), "data.parquet"),
    _texts("a parquet file with damaged pages", _parquet(_pages), "data.parquet"),
    _texts("a parquet column of numbers", _parquet(lambda content: content, [1.5, 2.5]), "data.parquet"),
    _texts("an unknown tokenizer", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt",
        "--data.tokenizer=@here/no"),
    _texts("length 0", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt", "--data.length=0"),
    _texts("length 1", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt", "--data.length=1",
        codes=(0, 2), row=False),
    _texts("max-documents -1", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt",
        "--data.max-documents=-1"),
    _texts("evaluated -1", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt", "--data.evaluated=-1"),
    _texts("an unknown packing", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt",
        "--data.packing=tight"),
    _texts("a cache folder that is a file", lambda here: _write(here / "data.txt", "a b c " * 900), "data.txt",
        "--data.cache-dir=@here/data.txt"),
    _texts("a FIFO", lambda here: __import__("os").mkfifo(here / "data.txt"), "data.txt"),
)  # fmt: skip


def _replace(argument: str, places: dict[str, Path]) -> str:
    for name, path in places.items():
        argument = argument.replace(f"@{name}", str(path))
    return argument


def _refused(case: Input, request: Any, here: Path) -> Any:
    """Runs one input and applies every law, on whole runs that must stay as they are."""
    used = {name for name in ("run", "adapted", "net", "texts") if any(f"@{name}" in text for text in case.arguments)}
    places = {"here": here}
    if "run" in used:
        places["run"] = request.getfixturevalue("digits")
    if "adapted" in used:
        places["adapted"] = request.getfixturevalue("adapted")
    if used & {"net", "texts"}:
        folder = request.getfixturevalue("pretrained")
        places |= {"net": folder / "network", "texts": folder / "texts"}
    if case.files:
        case.files(here)
    kept = {name: files(path) for name, path in places.items() if name != "here"}
    own = files(here)
    outcome = obeys(
        call(*(_replace(argument, places) for argument in case.arguments), "--json"), *case.codes, json_object=True
    )
    nothing_half_written(here)
    nothing_lost(own, here)
    for name, before in kept.items():
        nothing_lost(before, places[name])
        if outcome.code and (more := files(places[name]).keys() - before.keys()):
            raise Fault("left over", f"{name}: {sorted(more)[:3]}")
    if outcome.code and case.group == "commands" and (more := files(here).keys() - own.keys()):
        raise Fault("left over", f"{sorted(more)[:3]}")
    return outcome, places


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", few(TABLE, 24), ids=str)
def test_a_wrong_input_is_refused_in_one_line(case, request, tmp_path, record_property):
    outcome, places = _refused(case, request, tmp_path)
    if case.row and outcome.code:
        documented(record_property, case.group, case.what, outcome, **places)


# ---------------------------------------------------------------- values that are wrong for the type of an option

RECIPES = {
    "classification": ("train", "digits", *SHORT),
    "image-generation": ("train", "dit-digits", *SHORT, "--steps=2", "--evaluation.num-samples=0"),
    "masked-lm": ("train", "mdlm-pydocs", *TEXT),
    "causal-lm": ("train", "lm-pydocs", *TEXT),
    "recurrent-lm": ("train", "looped-pydocs", *TEXT),
}
WRONG: dict[Any, tuple[str, ...]] = {
    int: ("abc", "[1, 2]", "nan", "2.5"),
    float: ("abc", "[1, 2]", "nan", "inf"),
    bool: ("maybe", "7", "[true]"),
    str: (),  # every word is text
    list[str]: ("[[1]]",),
}


def _wrong_values() -> list[Input]:
    found = []
    groups: list[tuple[str, Any, str]] = [
        ("train", TrainingConfig, "classification"), ("blocks", BlocksConfig, "classification"),
        ("model", ModelConfig, "classification"), ("lora", LoraConfig, "causal-lm"),
        ("in_context", InContextConfig, "causal-lm"),
        *(("task", kind, name) for name, kind in TASKS.items()),
        ("data", TASKS["classification"].data, "classification"), ("data", TASKS["causal-lm"].data, "causal-lm"),
    ]  # fmt: skip
    for group, kind, task in groups:
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if (key := key_of(field, group)) is None:
                continue
            option = f"--{key}".replace("_", "-")
            wrong = WRONG.get(types[field.name], ("{a: 1}", "[[1]]"))
            if limits_of(field).choices:
                wrong = (*wrong, "no-such-choice")
            for value in wrong:
                arguments = (*RECIPES[task], "--output-dir=@here/run", f"{option}={value}")
                codes = (0, 1, 2) if value == "inf" else (2,)  # a limit that is none may be meant
                found.append(Input(task, f"{option}={value}", arguments, codes=codes, row=False))
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", few(_wrong_values(), 30), ids=str)
def test_a_value_of_the_wrong_type_is_refused(case, request, tmp_path):
    _refused(case, request, tmp_path)
    if case.codes == (2,) and (tmp_path / "run").exists():
        raise Fault("left over", "run")


# ---------------------------------------------------------------- numbers at and beyond the edge of what is possible

EDGES: dict[Any, tuple[str, ...]] = {
    int: ("-1", "0", "-1000000000000000000000"),
    float: ("-1", "0", "-1e-300", "1e300"),
}
SLOW = ("num_workers", "num_samples")  # a process each; a number of samples that is refused below 65


def _edges() -> list[Input]:
    found = []
    for group, kind in (("train", TrainingConfig), ("blocks", BlocksConfig), ("model", ModelConfig)):
        types = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            for value in EDGES.get(types[field.name], ()) if field.name not in SLOW else ():
                option = f"--{key_of(field, group)}={value}".replace("_", "-")
                arguments = ("train", "digits", *SHORT, "--output-dir=@here/run", option)
                found.append(Input("edges", option, arguments, codes=(0, 1, 2), row=False))
    return found


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", few(_edges(), 2), ids=str)
def test_a_number_at_the_edge_is_refused_or_works(case, request, tmp_path):
    _refused(case, request, tmp_path)


# ---------------------------------------------------------------- inputs that ask for too much memory

GREEDY = (
    Input("memory", "nested anchors", ("train", "@here/recipe.yaml"),
        lambda here: _write(here / "recipe.yaml", ANCHORS)),
    Input("memory", "1e12 samples", ("sample", "@run", "--num=1000000000000"), codes=(0, 1, 2)),
    Input("memory", "a batch of 1e12", ("train", "digits", *SHORT, "--batch-size=1000000000000"), codes=(1, 2)),
    Input("memory", "a hidden size of 1e9", ("train", "digits", *SHORT, "--model.hidden-size=1000000000"),
        codes=(1, 2)),
    Input("memory", "an image of 1e6", ("train", "digits", *SHORT, "--data.image-size=1000000"), codes=(1, 2)),
    Input("memory", "1e15 steps", ("train", "digits", *SHORT, "--steps=1000000000000000", "--train.learning-rate=nan"),
        codes=(2,)),
    Input("memory", "1e9 layers", ("plan", "digits", "--model.num-hidden-layers=1000000000", "--memory=1GiB"),
        codes=(1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("case", few(GREEDY, 1), ids=str)
def test_what_asks_for_too_much_is_refused(case, request, processes, tmp_path):
    places = {"here": tmp_path, "run": request.getfixturevalue("digits")}
    if case.files:
        case.files(tmp_path)
    process = processes.start(*(_replace(argument, places) for argument in case.arguments), memory=6 << 30)
    obeys(process.wait(45), *case.codes)
