"""What a task is: what it gives the trainer, and what everything else asks it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.handed import Handed
from diffusionblocks.blocks.model import BlockModel
from diffusionblocks.data.images.config import DataConfig
from diffusionblocks.data.images.splits import ImageSplits
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextSplits
from diffusionblocks.data.text.tokenizers import Tokenizer
from diffusionblocks.errors import Failed, UserError
from diffusionblocks.networks.parts import Batch
from diffusionblocks.seeds import Draws
from diffusionblocks.training.figures import Figure


class StepOutput(NamedTuple):
    """loss: scalar to differentiate. handed: what the next step gets: detached features, or the passage that was handed
    in. layers: layers that a sample passed, forward and backward (forward alone counts a third), where that is not the
    same in every step."""

    loss: Tensor
    handed: Handed = None
    layers: float | None = None


class Metric(NamedTuple):
    """A measured value and its standard error (None where it is exact)."""

    value: float
    stderr: float | None


def check_finite(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics. Raises Failed at the first that is not a finite number: nobody should read on from there."""
    for name, metric in metrics.items():
        if not math.isfinite(metric.value) or not math.isfinite(metric.stderr or 0.0):
            raise Failed(
                f"the evaluation's {name} is {metric.value} (standard error {metric.stderr}), no finite number: the "
                "weights, or a sample of the evaluated split, hold values that are not finite or far too large"
            )
    return metrics


S = TypeVar("S")
C = TypeVar("C")


@dataclass(frozen=True)
class Trained(Generic[S, C]):
    """A model with its data in the hands of its task; the weights are those that are evaluated.

    data: the splits. config: of the data. device: of the model. evaluate: the task's metrics on a data set, in batches
    that fit the device.
    """

    model: BlockModel
    data: S
    config: C
    device: torch.device
    evaluate: Callable[[Dataset], dict[str, Metric]]


TrainedOnImages = Trained[ImageSplits, DataConfig]
TrainedOnText = Trained[TextSplits, TextConfig]


class Sampling(NamedTuple):
    """What a trained model makes, and which options of `dblocks sample` have a meaning for it.

    makes: in words. options: those that `Asked` has. settings: those that are fields of the task, with the field's
    name. needs_data: it makes something of the test split. file: what it is written to without --output; empty = it is
    shown. endings: of a file that it can be written to; empty = any.
    """

    makes: str
    options: tuple[str, ...] = ()
    settings: Mapping[str, str] = {}
    needs_data: bool = False
    file: str = ""
    endings: Mapping[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a sample is to be, beside the settings of the task.

    num: how many. seed: of the noise. classes: of images, by number or name, separated by commas; taken in turn, all
    when empty. prompt: what a text continues; empty = nothing. chat: the prompt is a question; put it in the
    tokenizer's chat template and show only the answer. length: of a text in tokens; 0 = the window. stop: texts end
    before the first of these strings. stream: called with every piece of a text as it is written.
    """

    num: int = 16
    seed: int = 0
    classes: str = ""
    prompt: str = ""
    chat: bool = False
    length: int = 0
    stop: Sequence[str] = ()
    stream: Callable[[str], object] | None = None


class Images(NamedTuple):
    """images: uint8 [N, channels, height, width]. labels [N]."""

    images: Tensor
    labels: Tensor


class Made(NamedTuple):
    """Samples. found: what `--json` shows. shown: what a person reads. content: of a file. aside: about the making."""

    found: dict[str, Any]
    shown: str
    content: str | Images
    aside: str = ""


class LanguageModel(NamedTuple):
    """A model that writes token by token, as an evaluation of others asks it.

    tokenizer, tokenizer_name: of its text. window: tokens that it reads at most. log_p: (tokens, how many of the last
    are scored) -> their log-probability in nats, and whether they are what the model finds likeliest. write: (tokens
    [1, P], length, temperature, watch) -> tokens [1, at most length]; watch is called with all tokens after every new
    one, and True ends the text.
    """

    tokenizer: Tokenizer
    tokenizer_name: str
    window: int
    log_p: Callable[[Sequence[int], int], tuple[float, bool]]
    write: Callable[[Tensor, int, float, Callable[[Tensor], bool]], Tensor]


@dataclass(kw_only=True)
class Task:
    """One objective with its evaluation, and what the rest of the package asks of it. Stateless: all state lives in the
    model and the trainer.

    A subclass is a dataclass of the options that a recipe sets, and declares itself by these; `kind`, `target`, `data`,
    `step` and `evaluate` it must have, `diffusionblocks.register_task` or an entry point makes it known.

    kind: its name in a recipe. target: what networks estimate for it (see `networks.parts.Parts`). data: class of the
    data configuration that it takes. presets: named changes that every recipe of it has; `paper` is what the paper
    describes and its released code does. splits: a network is cut into blocks of layers (a looped one is not: the same
    layers serve all iterations). repeats: its options of how often the layers are applied, which mean nothing where
    they are applied once. writes: it trains ordinary language models, which can be used as they are. by_block: what it
    makes is made by one block at a time. compared_alike: options that all methods of a comparison share, whatever a
    preset says: how samples are drawn. unit: of its loss.
    """

    target: ClassVar[str]
    data: ClassVar[type[DataConfig] | type[TextConfig]]
    presets: ClassVar[Mapping[str, dict[str, Any]]] = {}
    splits: ClassVar[bool] = True
    repeats: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = False
    by_block: ClassVar[bool] = False
    compared_alike: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "nats"

    kind: str = ""

    # ------------------------------------------------------------------ objective

    def step(
        self,
        model: BlockModel,
        block: int,
        batch: Batch,
        *,
        handed: Handed = None,
        ranges: range | None = None,
        draws: Draws | None = None,
        settling: bool = False,
    ) -> StepOutput:
        """Loss of block `block` on a batch.

        handed: what the step before hands to this one. ranges: the blocks whose noise ranges the levels are drawn from
        (before branching); None = its own. draws: the randomness of the step, on the batch's device; None = new ones
        (`drawn_for`). settling: only the block's head learns (`LocalObjective`).
        """
        raise NotImplementedError

    def once(self) -> Self:
        """The task of the shallow network: of a looped one, the same with its core applied a single time."""
        return self

    def longest(self) -> Self:
        """The same task with steps that all need the most memory."""
        return self

    def lighter(self) -> dict[str, int]:
        """The option, with half its value, that makes steps need less memory and compute less; {} = there is none."""
        return {}

    def expected(self) -> tuple[float, float]:
        """How often a training step applies a looped network's core, on average, and how often with gradients."""
        return 1, 1

    def applied(self) -> int:
        """How often inference applies it."""
        return 1

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, model: BlockModel, batches: Iterable[Batch]) -> dict[str, Metric]:
        """Metrics while training, the first of which counts. Seeded: the same batches give the same numbers."""
        raise NotImplementedError

    def check_data(self, split: Dataset) -> None:
        """Raises UserError for what would only fail when the finished run is measured on `split`, which may be
        `Unread`."""

    def measure(self, trained: Trained[Any, Any], split: Any, metrics: dict[str, Metric]) -> dict[str, Metric]:
        """Metrics of the finished run: those that `evaluate` found on `split`, and what takes longer, such as metrics
        of samples."""
        return metrics

    def inference_layers(self, model: BlockModel) -> float | None:
        """Applications of a layer per token that is written, where that is not the number of layers."""
        return None

    def language_model(self, trained: Trained[Any, Any]) -> LanguageModel:
        """The model as lm-evaluation-harness asks it. Raises UserError where it does not write token by token."""
        raise UserError("lm-evaluation-harness scores language models that write token by token")

    # ------------------------------------------------------------------ sampling

    def sampling(self, model: BlockModel) -> Sampling | None:
        """What `make` makes; None where there is nothing to make."""
        return None

    def make(self, trained: Trained[Any, Any], asked: Asked) -> Made:
        """Samples of a trained model. Raises UserError for what it cannot make."""
        raise NotImplementedError

    def sampled(self, model: BlockModel) -> tuple[str, ...]:
        """The options that say how the samples were made that metrics are of."""
        return ()

    def figures(self, trained: Trained[Any, Any]) -> list[Figure]:
        """What the report shows of a trained model."""
        return []

    # ------------------------------------------------------------------ adapting a pretrained network

    def compares_before(self) -> bool:
        """Whether a pretrained network is measured before the first step as well (`measure_before`)."""
        return False

    def without_before(self) -> Self:
        """The same task without that."""
        return self

    def measure_before(self, trained: Trained[Any, Any], split: Any) -> dict[str, Metric]:
        """Those metrics of a finished run that are worth comparing with the network as it came."""
        return {}

    def continuations_of(
        self, trained: Trained[Any, Any], split: Any, context: Callable[[Tensor], Tensor]
    ) -> list[dict[str, str]]:
        """How an ordinary language model continues texts of `split`: dicts of `prompt`, `real` and `written`.

        context: (prompt [P]) -> the tokens that the method puts before it.
        """
        return []


def mean_with_error(values: Tensor) -> Metric:
    """Mean of independent per-sample values [N] and its standard error."""
    values = values.double()
    stderr = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return Metric(values.mean().item(), stderr)


def per_token(nats: Tensor, lengths: Tensor) -> Metric:
    """Sum of nats over sum of tokens, both per text [N], with the standard error over texts (of the ratio)."""
    mean = (nats.sum() / lengths.sum()).item()
    if len(nats) < 2:
        return Metric(mean, None)
    spread = (nats - mean * lengths).std() / lengths.mean() / len(nats) ** 0.5
    return Metric(mean, spread.item())


def drawn_for(batch: Batch, draws: Draws | None) -> Draws:
    """The draws of a step: those that were handed in, else new ones on the batch's device."""
    return draws or Draws.new(next(iter(batch.values())).device)


def beside(model: BlockModel, tensor: Tensor) -> Tensor:
    """A tensor on the host goes to where the model is; one that is on a device stays (weights of idle blocks visit it
    there)."""
    return tensor if tensor.device.type != "cpu" else tensor.to(next(iter(model.parameters())).device)


def all_beside(model: BlockModel, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Batches where the model is, see `beside`. Raises UserError where there is none."""
    empty = True
    for batch in batches:
        empty = False
        yield {name: beside(model, tensor) for name, tensor in batch.items()}
    if empty:
        raise UserError("there is nothing to evaluate: the evaluation data are empty")


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[dict[str, Tensor]]:
    for batch in batches:
        yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
