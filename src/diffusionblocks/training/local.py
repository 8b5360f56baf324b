"""The local objective: blocks that answer through heads of their own, and what keeps them from forgetting.

In features context block b is made a complete predictor by its head, which is not handed on. A head that knows nothing
would harm what the layers of a pretrained block know, in three ways out:

settling  (local.heads_first) At first only the heads learn, with local.distill from what the whole network answers to
          the features that they read.
trust     (local.trust) The layers of a block follow their head as far as its answers are as good as the network's.
ordinary  (local.ordinary) The ordinary loss stands beside the block's own, which then counts as far as it is trusted.

Shapes: N batch, R rows that predict.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.blocks.model import BlockModel, DiffusionBlocksModel
from diffusionblocks.errors import UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.theory import costs
from diffusionblocks.training.state import BlockState
from diffusionblocks.training.task import StepOutput


class LocalObjective:
    """What a block learns through its head, and how far its layers follow.

    Args:
        model: of the blocks. heads_first, trust: as in `TrainingConfig`; a task that is called by itself has neither.

    recent: running mean of the loss of each block, scalars on the device: what `trust` knows of the steps so far.
    """

    def __init__(self, model: BlockModel, heads_first: float = 0.0, trust: bool = False) -> None:
        self.model, self.heads_first = model, heads_first
        mixed = isinstance(model, DiffusionBlocksModel) and bool(model.config.ordinary)  # its own loss is weighed
        self._compares = trust and not mixed
        self.recent: dict[int, Tensor] = {}

    def check(self, states: list[BlockState], trained: list[int]) -> None:
        """Raises UserError where blocks with heads cannot learn as they were told."""
        last = self.model.num_blocks - 1
        if not isinstance(self.model, DiffusionBlocksModel) or not any(state.has_head for state in states):
            return
        if self.heads_first and self.model.target != "causal":
            raise UserError("local.heads_first is for blocks that write tokens (task.kind causal-lm)")
        if self._compares and last not in trained:
            raise UserError(
                f"local.trust compares every block with the last one: train block {last} too, or set local.trust false"
            )

    def settles(self, state: BlockState) -> bool:
        """Whether only the head learns in the next step."""
        return state.has_head and state.steps < round(self.heads_first * state.life)

    def trust(self, index: int, state: BlockState, loss: Tensor) -> float | Tensor:
        """How far the layers of block `index` may follow their head after a step of this loss: a factor on their rate.

        exp of what its answers are worse than those of the last block, in nats. 1 for the last block, which answers for
        the network; 0 as long as only the head learns. Worked out on the device, so that nobody waits for it.
        """
        if not self._compares or self.settles(state):
            return 1.0
        last, recent, before = self.model.num_blocks - 1, self.recent, self.recent.get(index)
        recent[index] = loss.detach() if before is None else 0.9 * before + 0.1 * loss.detach()
        if index == last or not state.has_head:
            return 1.0
        return _how_likely(recent[index], recent[last]) if last in recent else 0.0

    def distills(self, settling: bool) -> bool:
        """Whether the next step is one of `distilled`."""
        return settling and self._causal.config.distill

    def distilled(self, block: int, batch: Batch, weights: Tensor) -> StepOutput:
        """A head learns what the whole network answers to the features that it reads: divergence in nats, by the
        weights [N, R] of the rows."""
        model = self._causal
        denoiser = model.denoiser(block)
        hidden, context = denoiser.rows(batch, None, None, settling=True)
        assert context is not None
        with torch.no_grad():
            teacher = model.answer(block, context, batch)
        loss = (denoiser.head()(hidden, teacher=teacher) * weights).sum()
        after = model.layers[-1].stop - model.layers[block].stop
        return StepOutput(loss, context.detach(), self._settling_layers(block, after))

    def output(
        self, block: int, batch: Batch, noisy: Tensor, level: Tensor, labels: Tensor, weights: Tensor, settling: bool
    ) -> StepOutput:
        """The block's own loss at these levels, by the weights [N, R] of the rows, and the ordinary one beside it."""
        model = self._causal
        denoiser = model.denoiser(block)
        loss, context = denoiser.losses(batch, noisy, level, weights=weights, settling=settling)
        if model.config.ordinary and not settling and block < model.num_blocks - 1:
            assert context is not None
            end = denoiser.head()(model.answer(block, context, batch), labels, weights=weights)
            loss = _how_likely(loss, end).detach() * loss + model.config.ordinary * end
        layers = self._settling_layers(block) if settling else None
        return StepOutput(loss, None if context is None else context.detach(), layers)

    @property
    def _causal(self) -> CausalBlocks:
        assert isinstance(self.model, CausalBlocks)
        return self.model

    def _settling_layers(self, block: int, behind: int = 0) -> float:
        """Layer evaluations of a step in which the trunk, and the layers `behind` it, run forward alone."""
        return costs.settling(len(self.model.layers[block]), self._causal.config.heads(False, "causal"), behind)


def _how_likely(loss: Tensor, network: Tensor) -> Tensor:
    """How likely answers of this loss are the right ones, relative to those of the network: at most 1."""
    return (network - loss).clamp(max=0).exp()
