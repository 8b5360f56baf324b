"""One run: recipe -> trained model, run folder and summary.

DIR/config.yaml  metrics.jsonl  summary.json  checkpoints/  model/
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import subprocess
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusionblocks import __version__
from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.blocks.looped import LoopedBlocks, LoopedNetwork
from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel, EndToEndModel
from diffusionblocks.data.images.latents import load_data
from diffusionblocks.data.images.splits import ImageSplits
from diffusionblocks.data.stream import Unread
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextSplits, load_text
from diffusionblocks.data.text.tokenizers import HuggingFace, load_tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.evaluation import adaptation
from diffusionblocks.methods import METHODS, find_method, for_method
from diffusionblocks.networks.pretrained import without_progress
from diffusionblocks.planning.measure import PeakMemory, measure_peak
from diffusionblocks.recipes import Recipe, build, changed
from diffusionblocks.recipes.network import build_network, network_config
from diffusionblocks.recipes.schema import TARGETS
from diffusionblocks.seeds import derive
from diffusionblocks.system import files, plain_yaml, run_folder
from diffusionblocks.system.run_folder import CONFIG, DEPLOYED, MODEL, SUMMARY
from diffusionblocks.tasks import CausalLM, ImageGeneration, MaskedLM, NextToken, RecurrentLM
from diffusionblocks.training.progress import Progress
from diffusionblocks.training.task import Metric, check_finite
from diffusionblocks.training.trainer import Trainer

log = logging.getLogger("diffusionblocks")

# Keys that may differ between a run folder and the command that resumes it: they do not change the result, or (the last
# four, which memory may ask for in the middle of a run) hardly.
FREE_KEYS = (
    *("log_every", "checkpoint_every", "keep_checkpoints", "num_workers", "tensorboard", "residency", "device"),
    *("keep_graphs", "prefetch", "activation_checkpointing", "accumulation"),
)


WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # of a model that a new one takes the place of
Splits = ImageSplits | TextSplits


class Run(NamedTuple):
    """A recipe made ready: data, model and trainer."""

    recipe: Recipe
    data: Any  # Splits; which of them the recipe's task says
    model: BlockModel
    trainer: Trainer


def prepare(recipe: Recipe, output_dir: Path | None = None, data: Splits | None = None) -> Run:
    """Loads the data and builds network, model and trainer of a recipe.

    Raises UserError for everything in the recipe that cannot work together.
    """
    recipe = for_method(recipe, recipe.method)
    recipe.train.check()
    recipe.blocks.check(TARGETS[recipe.task.kind])
    if recipe.evaluate_on not in ("test", "validation"):
        raise UserError(f"evaluate_on must be test or validation, got {recipe.evaluate_on!r}")
    network_config(recipe, 1)  # for what it raises, before any data is read
    data = data or _load(recipe)
    _check_task(recipe, data)
    torch.manual_seed(derive(recipe.train.seed, "weights"))
    network = build_network(recipe, data.num_outputs)
    model = find_method(recipe.method).build(recipe, network)
    if recipe.model.start:
        _start(model, Path(recipe.model.start))
    trainer = Trainer(model, recipe.task, data.train, data.validation, recipe.train, output_dir=output_dir)
    if recipe.model.attention == "flex_attention" and trainer.device.type == "cpu":
        raise UserError("model.attention flex_attention cannot train on a CPU: take sdpa there")
    run = Run(recipe, data, model, trainer)
    find_method(recipe.method).check(recipe, data, model)
    return run


def _load(recipe: Recipe) -> Splits:
    if isinstance(recipe.data, TextConfig):
        return load_text(recipe.data, recipe.train.seed, mask=_masked(recipe))
    return load_data(recipe.data, recipe.train.seed, recipe.train.device)


def _masked(recipe: Recipe) -> bool:
    return TARGETS[recipe.task.kind] == "masked"


def _check_task(recipe: Recipe, data: Splits) -> None:
    """Raises UserError for what would only fail when the trained run is evaluated."""
    task = recipe.task
    if isinstance(task, MaskedLM | NextToken):
        from diffusionblocks.evaluation import text

        text.check(task, data.test)
    if isinstance(task, ImageGeneration) and task.num_samples:
        from diffusionblocks.evaluation import features

        least = features.Inception(task.inception).num_features if task.inception else features.WIDTH
        features.check("samples", task.num_samples, least)
        if not isinstance(data.test, Unread):
            features.check("reference images", len(_split(recipe, data)), least)


def _start(model: BlockModel, folder: Path) -> None:
    """Weights of a trained run. Raises UserError when they do not fit."""
    if not isinstance(model, DiffusionBlocksModel | LoopedNetwork):
        raise UserError(
            f"model.start is for blocks; a whole network starts from --model.pretrained {folder / 'model'} instead"
        )
    model.start_from(folder / "model" if (folder / "model").is_dir() else folder)


def train(recipe: Recipe, output_dir: Path, *, resume: bool = True) -> dict[str, Any]:
    """Trains (or finishes) a run and returns what summary.json holds. A finished run is not trained again.

    The folder is this process's alone in the meantime. resume: False = start over; the run that was there is kept until
    the new one has a checkpoint, and put back where that fails.

    Raises UserError for what cannot run, in the recipe or in the folder.
    """
    _check_place(output_dir)
    with run_folder.held(output_dir), run_folder.tidied(output_dir):
        _check_place(output_dir)
        if resume and (output_dir / CONFIG).is_file():
            _check_same(recipe, output_dir)
            if (summary := _finished(output_dir)) is not None:
                log.info("%s is already finished; use --resume never to train it again", output_dir)
                return summary
        with _collected_warnings() as messages:
            run = prepare(recipe, output_dir)
            begins = not (resume and (output_dir / CONFIG).is_file())
            if begins and (output_dir / CONFIG).is_file():
                run_folder.set_aside(output_dir)
            try:
                if begins:
                    _write_config(recipe, output_dir)
                return _train(run, output_dir, messages)
            except BaseException:
                if begins and not run_folder.has_checkpoint(output_dir):
                    run_folder.put_back(output_dir)
                raise


def _train(run: Run, output_dir: Path, messages: list[str]) -> dict[str, Any]:
    """A run from where it is to its summary."""
    split, trains = _split(run.recipe, run.data), find_method(run.recipe.method).trains
    earlier = adaptation.before(run, split, output_dir)
    if trains:
        run.trainer.fit()
        _save_model(run, output_dir)
    progress = run.trainer.progress
    metrics = {**_measure(run), **earlier}
    adaptation.write_samples(run, split, output_dir)
    memory = _peak(run) if trains else NOTHING
    summary = _summary(run, progress, metrics, memory, messages)
    files.write_json(output_dir / SUMMARY, summary)
    run_folder.drop_previous(output_dir)
    return summary


AGAIN = "remove it, and the same dblocks train command makes it again"
SUMMARY_SHAPE = {
    **{
        "method": str,
        "recipe": str,
        "seed": int,
        "num_blocks": int,
        "metrics": dict,
        "layer_evaluations": (int, float),
    },
    **{"samples_seen": int, "block_steps": int, "wall_seconds": (int, float), "versions": {"torch": str}},
    "peak_memory": {
        **dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "total"), int),
        **{"how_measured": str, "device": str},
    },
    **{"warnings": list, "git_commit": (str, type(None))},
}


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises UserError where there is none, or a damaged one."""
    path = folder / SUMMARY
    if not path.is_file():
        raise UserError(f"{folder} holds no finished run ({SUMMARY} is missing)")
    found = files.read_json(path, SUMMARY_SHAPE, AGAIN)
    for name, metric in found["metrics"].items():
        shape = {"value": (int, float), "stderr": (int, float, type(None))}
        if not isinstance(metric, dict) or files.misfit(metric, shape) is not None:
            raise files.Damaged(path, f"the metric {name} has no value and standard error", AGAIN)
    return found


def _finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished; None where it is not, or the summary is damaged and has to be made
    again."""
    try:
        return read_summary(folder) if (folder / SUMMARY).is_file() else None
    except files.Damaged as error:
        log.warning("%s: %s; it is made again", error.path, error.reason)
        return None


# What may differ from training when a finished run is evaluated or sampled.
LATER_KEYS = ("task.", "train.device", "data.path", "data.cache_dir", "data.vae", "evaluate_on")


def load_run(folder: Path, overrides: Iterable[tuple[str, Any]] = (), *, with_data: bool = True) -> Run:
    """A trained run from its folder.

    Args:
        overrides: settings (dotted key, value) that differ from the run's, among `LATER_KEYS`.
        with_data: False where only the model and the names of the classes are needed; a finished run has both.

    Raises UserError when there is no run or its checkpoints are damaged.
    """
    recipe = read_recipe(folder)
    overrides = list(overrides)
    if not recipe.task.splits and find_method(recipe.method).once:
        for key in ("task.iterations", "task.curve"):
            if key in dict(overrides):
                raise UserError(f"{key} cannot be changed: the method {recipe.method} applies its layers once")
    if recipe.model.start:  # the checkpoint has everything
        recipe.model.start, recipe.train.branch_at, recipe.train.own_batch = "", 0.0, 0
    recipe.train = dataclasses.replace(recipe.train, tensorboard=False, compile=False, residency="device")
    recipe = changed(recipe, overrides, LATER_KEYS)
    data = None if with_data else _absent(recipe, folder)
    run = prepare(recipe, None, data)
    if find_method(recipe.method).trains and not run.trainer.restore(folder):
        raise UserError(f"{folder} holds no usable checkpoint; train it first")
    run.trainer.residency  # noqa: B018  (moves the blocks to the device)
    return run


def read_recipe(folder: Path, consented: Recipe | None = None) -> Recipe:
    """The recipe of a run. consented: what this one asks to run is not asked again. Raises UserError where the folder
    holds none, or a damaged one."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder ({CONFIG} is missing); dblocks train makes one")
    content = plain_yaml.parse(files.unsealed(files.read_text(path), path), str(path))
    if not isinstance(content, dict):
        raise files.Damaged(path, f"it holds a {type(content).__name__}, not a recipe")
    try:
        return build(content, consented=consented)
    except UserError as error:
        raise UserError(f"{path} is no recipe of this version: {error}") from None


def _absent(recipe: Recipe, folder: Path) -> Splits | None:
    """Splits with nothing in them, for a model that is only to be run; None where the data must tell its classes."""
    train = for_method(recipe, recipe.method).train
    nothing = Unread(max(train.batch_size, train.own_batch))
    if isinstance(recipe.data, TextConfig):
        return TextSplits(
            nothing,
            nothing,
            nothing,
            load_tokenizer(recipe.data.tokenizer, _masked(recipe), recipe.data.trust_remote_code),
        )
    names = read_summary(folder).get("classes") if (folder / SUMMARY).is_file() else None
    return None if names is None else ImageSplits(nothing, nothing, nothing, names)


def evaluate(folder: Path, overrides: Iterable[tuple[str, Any]] = ()) -> dict[str, Any]:
    """Evaluates a run's newest checkpoint on its test split; the run's own summary supplies costs and memory."""
    run = load_run(folder, overrides)
    metrics, progress = _measure(run), run.trainer.progress
    trains = find_method(run.recipe.method).trains
    if not (folder / SUMMARY).is_file():
        return _summary(run, progress, metrics, _throwaway_peak(run.recipe, run.data) if trains else NOTHING, [])
    own = read_summary(folder)
    if trains and not progress.finished:
        log.warning("this evaluates an earlier checkpoint of %s, after %d block steps", folder, progress.block_steps)
    earlier = {name: metric for name, metric in own["metrics"].items() if name.endswith("_before")}
    now = {"metrics": {**_as_dicts(metrics), **earlier}, "evaluated_on": run.recipe.evaluate_on, **_sampled(run)}
    return {**own, **now, **(_made(run, progress) if trains else {})}


def _measure(run: Run) -> dict[str, Metric]:
    """The task's metrics, and those of samples for tasks that generate."""
    split = _split(run.recipe, run.data)
    metrics = run.trainer.evaluate(adaptation.as_scored(run, split))
    if isinstance(run.recipe.task, MaskedLM | NextToken):
        from diffusionblocks.evaluation.text import metrics as of_texts

        with run.trainer.averaged():
            metrics = of_texts(run, split, metrics)
    if isinstance(run.recipe.task, ImageGeneration):
        from diffusionblocks.evaluation.generation import metrics as of_samples

        with run.trainer.averaged():
            metrics |= of_samples(run, split)
    return check_finite(metrics)


def export_block(folder: Path, block: int, output: Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> Path:
    """Writes the weights of one block of a trained run (averaged, as they are evaluated) and returns the path."""
    run = load_run(folder, overrides, with_data=False)
    if not isinstance(run.model, DiffusionBlocksModel):
        raise UserError(f"{folder} is a run of the method {run.recipe.method}, which has no blocks to export")
    run.trainer.use_averages()
    run.model.block(block)  # checks
    path = output or folder / f"block-{block:02d}.safetensors"
    with files.replacing(path) as partial:
        run.model.save_block(block, partial)
    return path


def export_network(folder: Path, output: Path | None, overrides: Iterable[tuple[str, Any]] = ()) -> Path:
    """Writes a trained run as an ordinary Hugging Face model, with its tokenizer where that is one, and returns the
    folder.

    Raises UserError where the blocks are none.
    """
    run = load_run(folder, overrides, with_data=False)
    run.trainer.use_averages()
    path = output or folder / "huggingface"
    if isinstance(run.model, LoopedNetwork | LoopedBlocks):
        raise UserError(
            f"{folder} holds a looped network, which needs this package: diffusionblocks.load reads {folder / 'model'}"
        )
    if not isinstance(run.model, EndToEndModel | CausalBlocks):
        raise UserError(f"{folder} holds denoisers, no ordinary network; --block N writes one of them")
    with without_progress(), files.replacing_folder(path, WEIGHTS) as partial:
        if isinstance(run.model, CausalBlocks):
            _save_network(run, run.model, partial)
        else:
            run.model.save_pretrained(partial)
            if isinstance(run.data, TextSplits) and isinstance(run.data.tokenizer, HuggingFace):
                run.data.tokenizer.save(partial)
    return path


def _split(recipe: Recipe, data: Splits) -> Any:
    return data.test if recipe.evaluate_on == "test" else data.validation


def _throwaway_peak(recipe: Recipe, data: Splits) -> PeakMemory:
    """Peak memory of the recipe's steps, on a model that is thrown away."""
    # The steps after heads have settled are the larger ones.
    changes: dict[str, Any] = {"compile": False, "tensorboard": False, "heads_first": 0.0}
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **changes))
    if isinstance(recipe.task, RecurrentLM):
        recipe = dataclasses.replace(recipe, task=recipe.task.longest())
    return measure_peak(prepare(recipe, None, data).trainer)


NOTHING = PeakMemory(
    parameters=0, gradients=0, optimizer=0, activations=0, total=0, how_measured="nothing is trained", device="none"
)


def _peak(run: Run) -> PeakMemory:
    return (_cuda_peak if run.trainer.device.type == "cuda" else _throwaway_peak)(run.recipe, run.data)


def _cuda_peak(recipe: Recipe, data: Splits) -> PeakMemory:
    torch.cuda.empty_cache()  # the trained model stays allocated: measure against a clean baseline
    held = torch.cuda.memory_allocated()
    peak = _throwaway_peak(recipe, data)
    return dataclasses.replace(peak, total=peak.total - held, activations=peak.activations - held)


def _save_model(run: Run, output_dir: Path) -> None:
    """model/: a DiffusionBlocks model, or an ordinary Hugging Face one for the end-to-end methods."""
    assert isinstance(run.model, DiffusionBlocksModel | EndToEndModel | LoopedNetwork)
    run.trainer.use_averages()
    with without_progress():
        with files.replacing_folder(output_dir / MODEL, WEIGHTS) as partial:
            run.model.save_pretrained(partial)
            tokenizer = getattr(run.data, "tokenizer", None)
            if isinstance(run.model, EndToEndModel) and isinstance(tokenizer, HuggingFace):
                tokenizer.save(partial)
        if isinstance(run.model, CausalBlocks) and run.model.is_ordinary and run.recipe.model.pretrained:
            with files.replacing_folder(output_dir / DEPLOYED, WEIGHTS) as partial:
                _save_network(run, run.model, partial)
    run.trainer.use_averages()  # back


def _save_network(run: Run, model: CausalBlocks, folder: Path) -> None:
    """The ordinary language model that blocks are without their heads, with its tokenizer."""
    model.save_network(folder)
    if isinstance(run.data.tokenizer, HuggingFace):
        run.data.tokenizer.save(folder)


def _result(run: Run) -> dict[str, Any]:
    """What a run leaves to be used: where, who reads it, and whether that needs this package."""
    return find_method(run.recipe.method).result(run.recipe, run.model)._asdict()


def _summary(
    run: Run, progress: Progress, metrics: dict[str, Metric], memory: PeakMemory, messages: list[str]
) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "method": recipe.method,
        "recipe": recipe.name,
        "preset": recipe.preset,
        "seed": recipe.train.seed,
        "num_blocks": run.model.num_blocks,
        "layers": [[span.start, span.stop - 1] for span in run.model.layers],
        "evaluated_on": recipe.evaluate_on,
        "metrics": _as_dicts(metrics),
        **_sampled(run),
        **({"classes": run.data.classes} if isinstance(run.data, ImageSplits) else {}),
        **_made(run, progress),
        "result": _result(run),
        "peak_memory": memory.as_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
        "warnings": messages,
    }


def _made(run: Run, progress: Progress) -> dict[str, Any]:
    """What training took so far."""
    return {
        "layer_evaluations": progress.layer_evaluations,
        "samples_seen": progress.samples_seen,
        **_layers_per_token(run, progress),
        "block_steps": progress.block_steps,
        "wall_seconds": round(progress.wall_seconds, 3),
    }


def _layers_per_token(run: Run, progress: Progress) -> dict[str, Any]:
    """Of looped networks: layer applications, which are not the number of layers."""
    task = run.recipe.task
    if not isinstance(run.model, LoopedNetwork | LoopedBlocks) or not isinstance(task, RecurrentLM):
        return {}
    trained = progress.layer_evaluations / max(1, progress.samples_seen)
    return {"layers_per_token": {"training": trained, "inference": run.model.inference_layers(task.iterations)}}


def _sampled(run: Run) -> dict[str, Any]:
    """How the samples were made that the metrics are of."""
    task = run.recipe.task
    names: tuple[str, ...] = ()
    if isinstance(task, ImageGeneration):
        names = ("num_samples", "evaluations", "sampler", "sampling_steps", "grid", "guidance", "inception")
    elif isinstance(task, MaskedLM):
        names = ("num_samples", "sampler", "sampling_steps", "temperature", "top_p", "top_k", "teacher")
    elif isinstance(task, CausalLM):
        names = ("num_samples", "temperature", "top_p", "top_k", "teacher")
        if isinstance(run.model, CausalBlocks) and not run.model.is_ordinary:
            names += ("sampler", "sampling_steps")
    elif isinstance(task, RecurrentLM):
        names = ("num_samples", "iterations", "early_exit", "temperature", "top_p", "top_k", "teacher")
        names += ("sampler",) if isinstance(run.model, LoopedBlocks) else ()
    if not names:
        return {}
    return {"sampling": {name: getattr(task, name) for name in names}}


def _as_dicts(metrics: dict[str, Metric]) -> dict[str, dict[str, float | None]]:
    return {name: metric._asdict() for name, metric in metrics.items()}


def versions() -> dict[str, str]:
    import transformers

    return {
        "diffusionblocks": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def git_commit() -> str | None:
    """Commit of the package's own checkout, None when it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _check_place(folder: Path) -> None:
    """Raises UserError where a run must not be: nothing that this package did not make is ever overwritten or
    removed."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a folder is needed; choose another --output-dir")
    if run_folder.is_empty(folder):
        return
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not empty and holds no run; choose another --output-dir")
    if not files.has_seal(path) and not _is_older_run(path):
        raise UserError(f"{path} is no recipe of a run, so {folder} stays as it is; choose another --output-dir")


def _is_older_run(config: Path) -> bool:
    """Whether a file without a seal is what earlier versions wrote for a run: all groups of a recipe."""
    try:
        content = plain_yaml.parse(files.read_text(config), str(config))
    except UserError:
        return False
    return isinstance(content, dict) and {"method", "data", "model", "blocks", "task", "train"} <= content.keys()


def _check_same(recipe: Recipe, folder: Path) -> None:
    """Raises UserError when another recipe owns the folder."""
    written = read_recipe(folder, consented=recipe).as_dict()  # with defaults for keys it did not know
    difference = _difference(_relevant(written), _relevant(recipe.as_dict()))
    if difference:
        raise UserError(
            f"{folder} holds a run with another configuration ({difference}); choose another --output-dir, "
            "or --resume never to overwrite it"
        )


def _write_config(recipe: Recipe, folder: Path) -> None:
    files.write_text(folder / CONFIG, files.sealed(plain_yaml.dump(recipe.as_dict())))


def _relevant(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what it says for other methods than its own."""
    method = content["method"]
    own = find_method(method).reads
    others = {key for other in METHODS.values() for key in other.reads} - set(own)
    return {**content, **dict.fromkeys(others), "methods": {method: content["methods"].get(method)}}


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The first key that differs, with both values; empty when the runs are the same."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if key in (*FREE_KEYS, "description", "presets") or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _difference(a, b, f"{prefix}{key}."):
                return found
            continue
        return f"{prefix}{key} is {a!r} there and {b!r} here"
    return ""


class _collected_warnings:
    """Python warnings and this package's log warnings of a run, for the summary."""

    def __enter__(self) -> list[str]:
        self.messages: list[str] = []
        self._handler = logging.Handler(logging.WARNING)
        self._handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        log.addHandler(self._handler)
        self._catch = warnings.catch_warnings()
        self._catch.__enter__()
        warnings.simplefilter("ignore")
        return self.messages

    def __exit__(self, *error: object) -> None:
        self._catch.__exit__(None, None, None)
        log.removeHandler(self._handler)
