"""Everything the trainer can be told."""

from __future__ import annotations

from dataclasses import dataclass

from diffusionblocks.errors import UserError
from diffusionblocks.options import check_options, option
from diffusionblocks.system.devices import parse_device


@dataclass(kw_only=True)
class TrainingConfig:
    """Options of `Trainer`. Everything counted in steps is counted in a block's OWN optimizer steps.

    Args:
        steps: Optimizer steps of each block. With B blocks B * steps block steps run, which is as many layer
            evaluations as `steps` end-to-end steps of the same batch size.
        batch_size: Samples of an optimizer step.
        accumulation: Parts into which a batch is cut to save memory.
        optimizer: The optimizer. One per block, and one for shared parts; `adamw-8bit` needs bitsandbytes, `sgd` has
            the momentum betas[0].
        learning_rate: Learning rate at the peak of its schedule.
        weight_decay: Weight decay of the optimizer.
        betas: Decay rates of the optimizer's averages.
        schedule: What the learning rate does after warmup and hold. `cosine` falls to zero, `constant` stays.
        warmup: Share of the steps in which the learning rate rises.
        hold: Share of the steps after which a cosine schedule begins to fall.
        max_grad_norm: Norm to which each block's gradients are clipped; 0 = they are not.
        blocks: Blocks to train; empty = all. The others, and shared parts, stay as they are.
        order: Which block trains when. `random`: a random block per step ([DB]). `sweep`: a batch visits all blocks in
            order. `cyclic`: blocks take turns, each with batches of its own. `sequential`: one block to its end, then
            the next. `backward`, for the method exact: a batch visits all blocks, last to first, in one backward pass,
            which makes the updates of ordinary training.
        keep_graphs: Number of last blocks that are not recomputed, in the order backward. They keep their activations
            from the forward pass on; 1 where accumulation cuts batches.
        visit_steps: Optimizer steps of a visit to a block, so that moving it in and out pays.
        residency: Where idle blocks keep weights and optimizer state. From host memory the next block comes while one
            computes, where a card has room for both.
        branch_at: Share of the work after which one common block is copied into B; null = where it helps. The common
            block learns all noise ranges. 0 = none ([DB]); null = 0.5 where blocks can start as copies (input context,
            equal depth, own stem and readout), else 0. The rate begins to fall there: each copy settles in a minimum of
            its own.
        own_batch: Samples of a block's step after branching; 0 = batch_size. A block meets only its own noise range, so
            batch_size / num_blocks samples tell it as much about that as a whole batch tells the common block; its
            steps grow in number so that samples and layer evaluations stay. The rate then falls after `hold`: the
            common block settles first, and its copies go on from there.
        heads_first: Share of a block's steps in which only its head learns (local.head_layers). Gradients through a
            head that knows nothing would harm what a pretrained block knows.
        trust: Slow a block's layers as far as its head is behind the whole network. Their rate has the factor exp(loss
            of the last block - loss of this one, in nats): how likely its head finds the right answers. For blocks with
            heads, not in the order sequential.
        precision: Precision of products and weights. `bf16` is autocast: products in bf16, weights and optimizer state
            in fp32. `bf16-true` has weights, gradients and optimizer state in bf16 too: half the memory, small updates
            are lost.
        device: Where training runs, auto, cpu, cuda, cuda:1 or mps; auto = an accelerator if there is one.
        ema_decay: Decay of the moving average of the weights that evaluation uses; 0 = none.
        activation_checkpointing: Recompute activations inside the active block.
        compile: Compile layers with torch.compile. One graph serves all blocks (Llama of 6 layers x 256 on one CPU
            thread: end-to-end 1.15 +- 0.01, features blocks 1.12 +- 0.02 times as fast;
            benchmarks/results/compile.json).
        seed: Seed of every random decision.
        num_workers: Processes that load data; 0 = the training process loads them.
        log_every: Block steps of the whole run between log lines; 0 = only at the end.
        checkpoint_every: Block steps of the whole run between checkpoints; 0 = only at the end.
        evaluate_every: Block steps of the whole run between evaluations; 0 = only at the end.
        keep_checkpoints: Number of checkpoints that are kept.
        tensorboard: Log to TensorBoard, too.
    """

    steps: int = option(1000, least=1, most=10**15)
    batch_size: int = option(64, least=1)
    accumulation: int = option(1, least=1)
    optimizer: str = option("adamw", choices=("adamw", "adamw-8bit", "sgd", "adafactor"))
    learning_rate: float = option(1e-3, above=0)
    weight_decay: float = option(0.05, least=0)
    betas: list[float] = option([0.9, 0.999], least=0, below=1, count=2)
    schedule: str = option("cosine", key="learning_rate_schedule", choices=("cosine", "constant"))
    warmup: float = option(0.1, least=0, below=1)
    hold: float = option(0.0, least=0, most=1)
    max_grad_norm: float = option(1.0, least=0)
    blocks: list[int] = option([], least=0)
    order: str = option("sweep", choices=("random", "sweep", "cyclic", "sequential", "backward"))
    keep_graphs: int = option(1, least=1)
    visit_steps: int = option(1, least=1)
    residency: str = option("device", choices=("device", "host", "disk"))
    branch_at: float | None = option(None, least=0, below=1)
    own_batch: int = option(0, least=0)
    heads_first: float = option(0.0, least=0, below=1, group="local")
    trust: bool = option(False, group="local")
    precision: str = option("fp32", choices=("fp32", "bf16", "bf16-true"))
    device: str = "auto"
    ema_decay: float = option(0.0, least=0, below=1)
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    num_workers: int = option(0, least=0, most=1024)
    log_every: int = option(50, least=0)
    checkpoint_every: int = option(500, least=0)
    evaluate_every: int = option(0, least=0)
    keep_checkpoints: int = option(2, least=1)
    tensorboard: bool = False

    @property
    def graphs(self) -> int:
        """Of how many blocks the graphs are kept (`keep_graphs`)."""
        return self.keep_graphs if self.order == "backward" and self.accumulation == 1 else 1

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        check_options("train", self)
        parse_device(self.device)
        if self.batch_size % self.accumulation:
            raise UserError(f"train.accumulation {self.accumulation} must divide train.batch_size {self.batch_size}")
        if self.own_batch % self.accumulation:
            raise UserError(
                f"train.own_batch must be 0 or a multiple of train.accumulation {self.accumulation}, got "
                f"{self.own_batch}"
            )
        if self.keep_graphs > 1 and self.accumulation > 1 and self.order == "backward":
            raise UserError(
                f"train.keep_graphs {self.keep_graphs} keeps the graphs of a whole batch, which train.accumulation "
                f"{self.accumulation} cuts: set one of them to 1"
            )
        if self.order == "backward" and self.visit_steps > 1:
            raise UserError(
                "train.order backward takes one batch through all blocks: set train.visit_steps 1 (larger batches, "
                "with train.accumulation, make visits longer)"
            )
        if self.trust and self.order == "sequential":
            raise UserError("local.trust compares blocks as they learn: set train.order to sweep, cyclic or random")
        if self.blocks and self.branch_at:
            raise UserError("train.branch_at trains all blocks as one; with train.blocks set it to 0")
        if len(set(self.blocks)) < len(self.blocks):
            raise UserError(f"train.blocks names a block twice: {self.blocks}")
