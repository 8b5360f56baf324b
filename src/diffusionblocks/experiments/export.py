"""What a run leaves to be used: the saved model, an ordinary network where it is one, the weights of one block."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.blocks.looped import LoopedBlocks, LoopedNetwork
from diffusionblocks.blocks.model import DiffusionBlocksModel, EndToEndModel
from diffusionblocks.data.text.splits import TextSplits
from diffusionblocks.data.text.tokenizers import HuggingFace
from diffusionblocks.errors import UserError
from diffusionblocks.experiments.run import Run, load_run
from diffusionblocks.networks.pretrained import without_progress
from diffusionblocks.system import files
from diffusionblocks.system.run_folder import DEPLOYED, MODEL

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # of a model that a new one takes the place of


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
            run.model.save_network(partial)
        else:
            run.model.save_pretrained(partial)
        _save_tokenizer(run, partial)
    return path


def save_model(run: Run, output_dir: Path) -> None:
    """model/: a DiffusionBlocks model, or an ordinary Hugging Face one for the end-to-end methods."""
    assert isinstance(run.model, DiffusionBlocksModel | EndToEndModel | LoopedNetwork)
    run.trainer.use_averages()
    with without_progress():
        with files.replacing_folder(output_dir / MODEL, WEIGHTS) as partial:
            run.model.save_pretrained(partial)
            if isinstance(run.model, EndToEndModel):
                _save_tokenizer(run, partial)
        if isinstance(run.model, CausalBlocks) and run.model.is_ordinary and run.recipe.model.pretrained:
            with files.replacing_folder(output_dir / DEPLOYED, WEIGHTS) as partial:
                run.model.save_network(partial)
                _save_tokenizer(run, partial)
    run.trainer.use_averages()  # back


def _save_tokenizer(run: Run, folder: Path) -> None:
    if isinstance(run.data, TextSplits) and isinstance(run.data.tokenizer, HuggingFace):
        run.data.tokenizer.save(folder)
