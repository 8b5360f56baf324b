"""The one training loop: every method, order and residency runs through `Trainer.fit`.

A run is a sequence of visits (order.py). During a visit one block is on the device with its optimizer (residency.py,
state.py) and makes its steps (worker.py); what they hand on goes to the next visit. Checkpoints (checkpoint.py) are
written between visits, where nothing is handed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.exact import BlockCoordinateModel
from diffusionblocks.blocks.handed import Handed, Passage
from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel
from diffusionblocks.data.stream import BatchStream
from diffusionblocks.errors import RunStopped, UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.seeds import derive
from diffusionblocks.system.devices import autocast, check_precision, find_device, imitates_bf16
from diffusionblocks.system.interruption import Stop, Stopped, stop_on_signal
from diffusionblocks.system.run_folder import drop_previous, held
from diffusionblocks.theory import costs
from diffusionblocks.training import checkpoint
from diffusionblocks.training.compiling import check_compiler, compile_layers
from diffusionblocks.training.config import TrainingConfig
from diffusionblocks.training.divergence import Divergence
from diffusionblocks.training.local import LocalObjective
from diffusionblocks.training.order import (
    Plan,
    Visit,
    branch_steps,
    own_steps,
    phase_at,
    phases,
    resolve_branch,
    samples_per_step,
    steps_in_a_life,
    total_steps,
    trained_blocks,
)
from diffusionblocks.training.place import Place
from diffusionblocks.training.progress import Journal, Progress, ProgressBar
from diffusionblocks.training.residency import Residency
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.task import Metric, Task, on_device
from diffusionblocks.training.validation import validate
from diffusionblocks.training.worker import StepResult, Worker, cut

log = logging.getLogger("diffusionblocks")


class Steps(NamedTuple):
    """The steps of a visit: loss, norms of gradients, and what is handed on, see `StepResult`."""

    losses: list[Tensor]
    norms: list[tuple[Tensor | None, Tensor | None]]
    handed: list[Sequence[Handed]]


class Trainer:
    """Trains a `BlockModel` on a task.

    Args:
        model: `DiffusionBlocksModel` (from `convert`) or `EndToEndModel`.
        task: objective and evaluation, e.g. `tasks.Classification()`.
        train_data: map-style dataset whose items are dicts of tensors (`pixel_values`, `labels`, ...).
        eval_data: like train_data; evaluated every `evaluate_every` block steps.
        config: see `TrainingConfig`.
        output_dir: where metrics.jsonl, checkpoints and TensorBoard files go; None keeps nothing.

    Raises UserError for a configuration that cannot run.
    """

    def __init__(
        self,
        model: BlockModel,
        task: Task,
        train_data: Dataset,
        eval_data: Dataset | None = None,
        config: TrainingConfig | None = None,
        *,
        output_dir: str | Path | None = None,
    ) -> None:
        self.model, self.task, self.eval_data = model, task, eval_data
        self.config = config or TrainingConfig()
        self.config.check()
        self._check_combination()
        if self.config.evaluate_every and eval_data is not None and len(eval_data) == 0:  # type: ignore[arg-type]
            raise UserError("train.evaluate_every has nothing to evaluate: the evaluation data are empty; set it to 0")
        if self.config.branch_at is None:
            may = isinstance(model, DiffusionBlocksModel) and model.config.may_branch(model.layers)
            self.config = resolve_branch(self.config, may)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.device = find_device(self.config.device)
        check_precision(self.config.precision, self.device)
        if self.device.type == "cuda":  # streams, memory statistics and workspaces are those of the current device
            torch.cuda.set_device(self.device)
        self.stream = BatchStream(train_data, self.config.batch_size, self.config.seed, self.config.num_workers)
        self.streams = {self.config.batch_size: self.stream}
        for samples in self._own_batch_sizes() - {self.config.batch_size}:
            seed = derive(self.config.seed, "own")
            self.streams[samples] = BatchStream(train_data, samples, seed, self.config.num_workers)
        in_bf16 = all(p.dtype == torch.bfloat16 for p in model.parameters())
        if self.config.precision == "bf16-true" and not in_bf16:
            model.to(torch.bfloat16)
        for block in map(model.block, range(model.num_blocks)):
            block.activation_checkpointing = self.config.activation_checkpointing
        if self.config.compile:
            check_compiler(self.device)
            compile_layers(model)
        self.trained = trained_blocks(self.config, model.num_blocks)
        if len(self.trained) < model.num_blocks:
            model.shared.requires_grad_(False)  # the blocks that stay rely on it
        life = steps_in_a_life(self.config, model.num_blocks)
        common = branch_steps(self.config, model.num_blocks)
        own = own_steps(self.config, model.num_blocks)
        self.states = [BlockState(model.block(i), self.config, life, common, own) for i in range(model.num_blocks)]
        self.shared = BlockState(model.shared, self.config, total_steps(self.config, model.num_blocks))
        self.progress = Progress()
        self.place = Place(model, self.states, self.shared, self.config, self.device, self.output_dir)
        self.local = LocalObjective(model, self.config.heads_first, self.config.trust)
        self.local.check(self.states, self.trained)
        self.worker = Worker(model, task, self.config, self.local)
        self._divergence = Divergence(self.config, self.device, self.streams, self.output_dir)
        self._first_step, self._passed = 0, dict[str, int]()

    def _own_batch_sizes(self) -> set[int]:
        """Samples of the steps after branching. Raises UserError for own batches that a run cannot have."""
        config, num_blocks = self.config, self.model.num_blocks
        cut = phases(config, num_blocks)
        if config.own_batch and len(cut) == 1:
            raise UserError("train.own_batch is for runs that branch (train.branch_at); set train.batch_size instead")
        return {samples_per_step(config, network, num_blocks) for phase in cut for network in phase.networks}

    def _check_combination(self) -> None:
        if self.config.order == "backward" and not isinstance(self.model, BlockCoordinateModel):
            raise UserError(
                "train.order backward passes the ordinary gradient from block to block, which the method exact does "
                "alone; set it to sweep, cyclic, random or sequential"
            )
        if self.config.branch_at and isinstance(self.model, DiffusionBlocksModel):
            if self.model.config.context != "input":
                raise UserError(
                    "train.branch_at needs blocks.context input: blocks on features of one another cannot start as "
                    "copies"
                )
            if len({len(span) for span in self.model.layers}) > 1:
                raise UserError(
                    "train.branch_at needs blocks of equal depth; set it to 0 or drop blocks.layers_per_block"
                )

    @property
    def residency(self) -> Residency:
        """Of the blocks. Set up on first use, see `Place`."""
        return self.place.residency

    # ------------------------------------------------------------------ one step

    def autocast(self) -> AbstractContextManager[None]:
        """Products in bf16 where `train.precision` says so."""
        return autocast(self.device, self.config.precision)

    def block_step(
        self, index: int, batch: Batch, handed: Sequence[Handed] = (), *, ranges: range | None = None
    ) -> StepResult:
        """One step of a block that is on the device (worker.py).

        handed: what the step before handed on. ranges: the blocks whose noise ranges it learns, before they part
        (None = its own).
        """
        states = self.states[index], self.shared
        handed = handed or self._passages(index)
        result = self.worker.step(
            index, states, batch, handed, ranges=ranges, borrowed=lambda: self.residency.borrowed()
        )
        self.progress.layer_evaluations += result.layers * len(next(iter(batch.values())))
        return result

    def visit(
        self, visit: Visit, batches: Sequence[Batch], handed: list[Sequence[Handed]], upcoming: int | None = None
    ) -> Steps:
        """All steps of one visit. handed: by the visit before, for each batch; a step takes it out. upcoming: the block
        of the next visit."""
        self.place.make_room(self.trained)
        self.place.part(visit.copies)
        made = Steps([], [], [])
        with self.residency.active(visit.block):
            if upcoming is not None:
                self.residency.prefetch(upcoming)
            for batch in batches:
                given = handed.pop(0) if visit.handed else self.entering(visit.block, batch)
                result = self.block_step(visit.block, batch, given, ranges=visit.ranges)
                made.losses.append(result.loss)
                made.norms.append(result.norms)
                made.handed.append(result.handed)
        self.progress.block_steps += len(batches)
        return made

    def entering(self, index: int, batch: Batch) -> Sequence[Handed]:
        """What a step of block `index` gets where none before it handed anything on: features, made by the blocks
        before it, or, for the first in the order backward, passages to fill."""
        context = self.context(index, batch)
        if context is None:
            return self._passages(index)
        passed = sum(len(self.model.block(i).layers) for i in range(index))
        self.progress.layer_evaluations += costs.forward(passed) * len(context)
        return cut(context, self.config.accumulation)

    def context(self, index: int, batch: Batch) -> Tensor | None:
        """The clean stream that enters block `index`, or None where it reads the input itself."""
        if index == 0 or not isinstance(self.model, DiffusionBlocksModel):
            return None
        with self.residency.borrowed(), self.autocast():
            return self.model.context(batch, index)

    def _passages(self, index: int) -> Sequence[Handed]:
        """Order backward: new ones for the parts of a batch, where block `index` is the first that steps."""
        if self.config.order != "backward" or index != self.round[0]:
            return ()
        coordinates = "passage", self.states[index].steps
        seeds = [derive(self.config.seed, *coordinates, part) for part in range(self.config.accumulation)]
        return [Passage(self.trained, seed, self.trained[-self.config.graphs : -1]) for seed in seeds]

    @property
    def round(self) -> list[int]:
        """The trained blocks in the order in which a batch visits them."""
        return self.trained[::-1] if self.config.order == "backward" else self.trained

    # ------------------------------------------------------------------ the run

    def fit(self, *, resume: bool = True) -> Progress:
        """Trains to the end, from the newest whole checkpoint if there is one and `resume` allows it.

        Raises RunStopped after Ctrl-C or SIGTERM (a checkpoint is written first), UserError when a loss, gradient or
        weight is not finite, an earlier call failed while a batch was between blocks, or another process works in the
        same folder, and DiskFull; earlier checkpoints stay valid.
        """
        with nullcontext() if self.output_dir is None else held(self.output_dir):
            return self._fit(resume)

    def _fit(self, resume: bool) -> Progress:
        if resume and self.output_dir is not None and not self.place.begun:  # else it goes on from where it is
            self.restore(self.output_dir)
        if self.progress.finished:
            return self.progress
        if self.config.precision != "fp32" and imitates_bf16(self.device):
            log.warning("this processor imitates bf16, which is much slower than --train.precision fp32")
        known = self.progress.journal_bytes, self.progress.journal_hash
        journal = Journal(self.output_dir, *known, self.config.tensorboard)
        try:
            with self._everything_trains(), stop_on_signal() as stop:
                self._make_visits(journal, stop)
        finally:
            journal.close()
        return self.progress

    def _make_visits(self, journal: Journal, stop: Stop) -> None:
        """The visits that are left, with what is due between them."""
        total = total_steps(self.config, self.model.num_blocks)
        before, started = self.progress.wall_seconds, time.monotonic()
        self._first_step, self._passed, saved = self.progress.block_steps, {}, -1
        with ProgressBar(total, self.progress.block_steps, self.device) as bar:
            for visit, losses in self.visits():
                self.progress.wall_seconds = before + time.monotonic() - started
                journal.record(visit.block, losses, self.states[visit.block].learning_rate())
                bar.update(visit.block, losses, self.progress.block_steps)
                if self._due("log", self.config.log_every) or self._divergence.full:
                    self._divergence.check()
                    journal.flush(self.progress)
                if not visit.border:
                    continue
                if stop or self._due("checkpoint", self.config.checkpoint_every):
                    self._save(journal, stop)
                    saved = self.progress.block_steps
                if self._due("evaluate", self.config.evaluate_every) and self.eval_data is not None:
                    try:
                        found = {k: v._asdict() for k, v in self.evaluate(self.eval_data, stop).items()}
                        journal.write({**self._position(), "validation": found})
                    except Stopped:
                        if saved != self.progress.block_steps:
                            self._save(journal, stop)
                if stop and self.progress.block_steps < total:
                    raise RunStopped(self._stopped_message(), stop.signal)
        self.progress.finished = True
        self._save(journal, stop)
        if stop:
            raise RunStopped(self._stopped_message(), stop.signal)

    @contextmanager
    def _everything_trains(self) -> Iterator[None]:
        """Steps that pass other blocks switch gradients off there; afterwards everything is as it was, and in one
        place."""
        try:
            yield
        finally:
            for parameter in (p for state in self.states for p in state.parameters.values()):
                parameter.requires_grad_(True)
            for parameter in (p for state in (*self.states, self.shared) for p in state.parameters.values()):
                parameter.grad = None  # of a step that failed
            self.place.leave()

    def visits(self) -> Iterator[tuple[Visit, list[Tensor]]]:
        """Makes the visits that are left, loading every batch once."""
        plan, first = Plan(self.config, self.model.num_blocks), self.progress.visits
        if first < len(plan) and plan[first].carried:
            raise UserError(
                "the last run of this trainer ended while a batch was between blocks, where it cannot go on; make a "
                "new Trainer (with an output_dir it resumes from the last checkpoint)"
            )
        loaded = {
            samples: on_device(stream.load(plan.batches(first, samples)), self.device)
            for samples, stream in self.streams.items()
        }
        batches: list[Batch] = []
        handed: list[Sequence[Handed]] = []
        for visit, following in pairwise(chain(plan.since(first), [None])):
            assert visit is not None
            if not visit.carried:
                batches = list(islice(loaded[visit.samples], len(visit.batches)))
                self.progress.samples_seen += len(batches) * visit.samples
            # A branching visit replaces the blocks that are away: nothing may be under way before it.
            upcoming = None if following is None or following.copies else following.block
            if not visit.handed:
                handed = []
            before = self.states[visit.block].steps, self.shared.steps
            losses, norms, handed = self.visit(visit, batches, handed, upcoming)
            self._divergence.watch(visit, losses, norms, before)
            self.progress.visits += 1
            yield visit, losses

    def _due(self, what: str, every: int) -> bool:
        """Whether the run has passed another multiple of `every` block steps since this was last asked."""
        if every < 1:
            return False
        passed = self.progress.block_steps // every
        due = passed > self._passed.get(what, self._first_step // every)
        self._passed[what] = passed
        return due

    def _position(self) -> dict[str, Any]:
        return {"block_steps": self.progress.block_steps, "seconds": round(self.progress.wall_seconds, 3)}

    def _stopped_message(self) -> str:
        if self.output_dir is None:
            return f"stopped after {self.progress.block_steps} block steps; nothing saved (no output_dir)"
        where = checkpoint.existing(self.output_dir)[-1]
        return (
            f"stopped after {self.progress.block_steps} block steps; checkpoint in {where}; run the same command to "
            "go on"
        )

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, data: Dataset, stop: Stop | None = None) -> dict[str, Metric]:
        """The task's metrics on `data`, with the moving averages if there are any (validation.py).

        Raises Failed for a metric that is not finite.
        """
        with self.averaged():
            return validate(self.model, self.task, data, self.device, self.config.batch_size, stop)

    def averaged(self) -> AbstractContextManager[None]:
        """The model as it is evaluated: moving averages in place, no gradients, every block readable, and in the place
        of a block that has not parted from its network, the block that holds that."""
        now = phase_at(self.config, self.model.num_blocks, self.progress.block_steps)
        return self.place.evaluated(tuple(map(now.holder, range(self.model.num_blocks))))

    def use_averages(self) -> None:
        """Puts the moving averages in the model's place for good (before saving the finished model)."""
        self.place.swap_averages()

    # ------------------------------------------------------------------ checkpoints

    def named_states(self) -> dict[str, BlockState]:
        """The states by the names of their files in a checkpoint."""
        return {"shared": self.shared} | {f"block-{i:02d}": state for i, state in enumerate(self.states)}

    def _save(self, journal: Journal, stop: Stop) -> None:
        """A checkpoint, if everything is finite."""
        with stop.saving():
            self._divergence.check()
            journal.flush(self.progress)
            if self.output_dir is None:
                return
            self.place.settle()
            journal.sync()
            self.progress.journal_bytes, self.progress.journal_hash = journal.bytes, journal.digest
            self.progress.recent = {str(index): loss.item() for index, loss in self.local.recent.items()}
            step, progress = self.progress.block_steps, {"progress": vars(self.progress)}
            try:
                checkpoint.save(self.output_dir, step, self.named_states(), progress, self.config.keep_checkpoints)
            except checkpoint.NotFinite as error:
                self._divergence.stop(str(error))
            drop_previous(self.output_dir)

    def restore(self, folder: Path) -> bool:
        """Loads the newest whole checkpoint below `folder`, before the first step. False when there is none."""
        if not checkpoint.existing(folder):
            return False
        assert not self.place.begun, "restore before the first step"
        saved = checkpoint.restore_latest(folder, self.named_states())
        if saved is None:
            return False
        try:
            self.progress = Progress(**saved["progress"])
        except TypeError:
            raise UserError(
                f"the checkpoints in {folder} are of a newer version of this package; train it again"
            ) from None
        self.local.recent = {int(k): torch.tensor(v, device=self.device) for k, v in self.progress.recent.items()}
        if not self.progress.finished:
            log.info("resuming after %d block steps", self.progress.block_steps)
        return True
