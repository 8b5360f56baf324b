"""Looped networks: a prelude, a core that is applied over and over, and a coda (recurrent depth, [Huginn],
arXiv 2502.05171).

The prelude turns tokens into embeddings, once. The core reads them beside its own state, at every iteration; the coda
and the readout make logits of the last state. `LoopedNetwork` is trained as such networks are: by unrolling the core
from a random state. `LoopedBlocks` is the same network as ONE denoiser of all noise levels ([DB] section 5.5): the
noisy embedding of the next token is the core's state, one pass is a whole training step, and K iterations at inference
are K noise levels.

Row r attends, in the core, to the states of the rows up to r. They are noisy versions of tokens up to r + 1, of which
all but its own target are tokens that it reads anyway: nothing leaks.

Shapes: N batch, T tokens, R = T - 1 rows that predict the next token, D width, C width of the level embedding, K
iterations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffusionblocks.blocks.causal import CausalBlocks, CausalDenoiser, clean_tokens
from diffusionblocks.blocks.config import BlocksConfig
from diffusionblocks.blocks.model import Block, BlockModel, documents_apart
from diffusionblocks.blocks.saving import aligned, load_weights, read_description, save_described
from diffusionblocks.errors import UserError
from diffusionblocks.networks.attention import View
from diffusionblocks.networks.conditioning import ConditionedLayer, LevelEmbedding
from diffusionblocks.networks.parts import Batch, Parts
from diffusionblocks.networks.readout import TokenReadout, chunk_size
from diffusionblocks.seeds import normal_like
from diffusionblocks.theory import costs
from diffusionblocks.theory.evidence import Evidence, weight_of
from diffusionblocks.theory.precondition import coefficients

KIND = "looped network"  # what the description of a saved LoopedNetwork says


class Injection(nn.Module):
    """What the core reads: a linear map of its normalised state, zero at first, and of the prelude's output, at first
    the identity.

    So a network that is taken apart into a loop starts with its own function, however often the core runs. What a state
    weighs is not seen, only its direction: the noise level is a condition of the layers (`blocks.condition_width`).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(2 * width, width, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], 1))

    def forward(self, state: Tensor, injected: Tensor) -> Tensor:
        """Both [N, R, D]."""
        # Not in the lower precision of autocast: it is where the residual stream begins.
        return self.linear(torch.cat([self.norm(state).to(injected), injected], -1)).to(injected)


class LoopedBlock(Block):
    """All layers of a looped network. With a `level`, the layers of core and coda see the noise level."""

    def __init__(
        self, parts: Parts, config: BlocksConfig, *, level: LevelEmbedding | None = None, own_ends: bool = True
    ) -> None:
        layers, first, last = list(parts.layers), config.prelude, len(parts.layers) - config.coda
        if first >= last:
            raise UserError(
                f"looped.prelude {config.prelude} and looped.coda {config.coda} leave no layer of {len(layers)} for "
                "the core"
            )
        if level is not None:
            width = config.condition_width
            layers[first:] = [
                ConditionedLayer(layer, parts.layer_norms, parts.width, width) for layer in layers[first:]
            ]
        ends: dict[str, Any] = {"stem": parts.stem, "readout": parts.readout} if own_ends else {}
        super().__init__(layers, **ends)
        self.level, self.injection = level, Injection(parts.width)
        self.spans = {"prelude": range(first), "core": range(first, last), "coda": range(last, len(layers))}

    def forward(self, use: str, *arguments: Any) -> Tensor:
        """use `prelude`: (hidden, view) -> what the core reads. `core`: (state, the prelude's output, condition,
        view) -> state. `coda`: (state, condition, view) -> hidden [N, R, D]. condition [N, C] or None."""
        if use == "core":
            state, injected, *rest = arguments
            first, *others = self.part("core")

            def entering(state: Tensor, *conditions: Any) -> Tensor:  # one piece when activations are recomputed
                return first(self.injection(state, injected), *conditions)

            return self.run([entering, *others], state, *rest)
        return self.run(self.part(use), *arguments)

    def part(self, name: str) -> nn.ModuleList:
        """`prelude`, `core` or `coda`."""
        span = self.spans[name]
        return self.layers[span.start : span.stop]

    def passed(self, iterations: float, *, trained: float | None = None) -> float:
        """Layers that a token passes in so many iterations. Those of the core without gradients, all but `trained`,
        count a third."""
        trained = iterations if trained is None else trained
        once = len(self.spans["prelude"]) + len(self.spans["coda"])
        return costs.unrolled(once, len(self.spans["core"]), iterations, trained)

    def table(self, repeated: Sequence[str], more: Sequence[tuple[str, str, str, str]] = ()) -> str:
        """Part, its layers, how often an inference applies them, parameters. repeated: parts that every iteration
        applies. more: rows to add."""
        rows = [("part", "layers", "applied", "parameters")]
        for name, span in self.spans.items():
            if not span:
                continue
            count = sum(p.numel() for p in self.part(name).parameters())
            count += sum(p.numel() for p in self.injection.parameters()) if name == "core" else 0
            often = "K times" if name in repeated else "once"
            rows.append((name, f"{span[0]}-{span[-1]}", often, f"{count:,}"))
        return aligned([*rows, *more])


class LoopedNetwork(BlockModel):
    """A looped network, to be trained by unrolling it.

    Args:
        parts: from an adapter. config: `prelude` and `coda`.
    """

    def __init__(self, parts: Parts, config: BlocksConfig) -> None:
        super().__init__()
        config.check("recurrent")
        network = parts.network
        self.config = config
        self.source = {"class": type(network).__name__, "config": network.config.to_diff_dict()}
        self.blocks = nn.ModuleList([LoopedBlock(parts, config)])
        self.shared = nn.ModuleDict()
        self.layers = [range(len(parts.layers))]

    @property
    def loop(self) -> LoopedBlock:
        block = self.block(0)
        assert isinstance(block, LoopedBlock)
        return block

    @property
    def readout(self) -> TokenReadout:
        readout = self.loop.readout
        assert isinstance(readout, TokenReadout)
        return readout

    def hidden(
        self,
        batch: Batch,
        iterations: Sequence[int],
        *,
        trained: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Last hidden states [N, R, D] after each of these numbers of iterations, from a state of standard Gaussian
        noise.

        trained: gradients flow through this many of the last iterations only (truncated backpropagation); None = all.
        """
        if not iterations or min(iterations) < 1:
            raise UserError(f"a looped network iterates at least once, got {list(iterations)}")
        read = clean_tokens(batch)
        assert self.loop.stem is not None
        embedded = self.loop.stem(read)
        view = documents_apart(read, embedded)
        injected = self.loop("prelude", embedded, view)
        state = normal_like(injected, generator)
        most, found = max(iterations), {}
        first = 0 if trained is None else max(0, most - trained)
        with torch.no_grad():
            for _ in range(first):
                state = self.loop("core", state, injected, None, view)
        if first:
            torch.clear_autocast_cache()  # it may hold weights that were cast without gradients
        for number in range(first + 1, most + 1):
            state = self.loop("core", state, injected, None, view)
            if number in iterations:
                found[number] = self.loop("coda", state, None, view)
        return [found[number] for number in iterations]

    def layer_evaluations(self, index: int) -> float:
        """Of one iteration; a step says itself how many it made (`StepOutput.layers`)."""
        return self.loop.passed(1)

    def inference_layers(self, iterations: int) -> int:
        """Layer applications per token that is written."""
        return costs.unrolled_inference(round(self.loop.passed(0)), len(self.loop.spans["core"]), iterations)

    def summary(self) -> str:
        """A table: part, layers, how often they are applied, parameters; and layer applications per token."""
        once, core = round(self.loop.passed(0)), len(self.loop.spans["core"])
        training = "as many in training as iterations are drawn, those without gradients a third"
        return (
            f"{self.loop.table(['core'])}\n"
            f"layers per token: {once} + {core} K with K iterations at inference; {training}"
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes weights as safetensors and everything else as JSON; `diffusionblocks.load` reads them back."""
        save_described(self, folder, {"kind": KIND, "blocks": asdict(self.config), "source": self.source})

    def start_from(self, folder: str | Path) -> None:
        """Takes over the weights of a looped network that `save_pretrained` wrote. Raises UserError when they are of
        another kind."""
        description = read_description(folder)
        if description.get("kind") != KIND:
            raise UserError(f"{folder} holds denoisers; this method unrolls a looped network (method end-to-end)")
        check_parts(folder, description, self.config)
        load_weights(self, folder)


class LoopedDenoiser(CausalDenoiser):
    """A looped network as a denoiser: one iteration at one noise level. See `CausalDenoiser`; level: sigma [N]."""

    block: LoopedBlock

    @property
    def reads_noise(self) -> bool:
        return True

    def rows(
        self, batch: Batch, noisy: Tensor | None, level: Tensor | None, *, settling: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        assert noisy is not None and level is not None
        return self.iterate(noisy, level, *self.embedded(batch)), None

    def embedded(self, batch: Batch) -> tuple[Tensor, View | None]:
        """The prelude's output [N, R, D], which does not depend on the level; and who attends to whom."""
        read = clean_tokens(batch)
        hidden = self.part("stem")(read)
        view = documents_apart(read, hidden)
        return self.block("prelude", hidden, view), view

    def iterate(self, noisy: Tensor, level: Tensor, injected: Tensor, view: View | None) -> Tensor:
        """z [N, R, D] at level [N] -> last hidden states [N, R, D]. injected: the prelude's output."""
        condition = self.condition(level)
        state = self.block("core", noisy.to(injected), injected, condition, view)
        return self.block("coda", state, condition, view)

    def condition(self, level: Tensor) -> Tensor | None:
        """What layers see of the level [N, C]; None where they do not."""
        return None if self.block.level is None else self.block.level(coefficients(level.float()).noise)

    def told(
        self, hidden: Tensor, labels: Tensor, known: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """How many nats `more` adds to what is known of the labels [M]: log p(y | z, z') - log p(y | z), or
        -log p(y | z) if it is all (None). In chunks.

        hidden [M, D]: last states. known, more: z [M, D] and its level [M].
        """
        found = []
        size = chunk_size(len(hidden), self.head().head.out_features)
        parts = (tensor.split(size) for tensor in (hidden, labels, *known, *(more or ())))
        for part, wanted, z, level, *rest in zip(*parts, strict=True):
            logits = self.target.logits(self.head()(part), z, level).float()
            nats = cross_entropy(logits, wanted, reduction="none")
            if rest:
                lower, its_level = rest
                gained = lower.float() / its_level[:, None] ** 2 - z.float() / level[:, None] ** 2
                logits = logits + weight_of(Evidence(gained, self.target.rows))
                nats = nats - cross_entropy(logits, wanted, reduction="none")
            found.append(nats)
        return torch.cat(found)


class LoopedBlocks(CausalBlocks):
    """A looped network as one denoiser of all noise levels."""

    def _build(self, parts: Parts) -> Iterator[Block]:
        own = self.config.shared == "copies"
        if not own:
            self.shared.update({"stem": parts.stem, "readout": parts.readout})
        width = self.config.condition_width
        yield LoopedBlock(parts, self.config, level=LevelEmbedding(width) if width else None, own_ends=own)

    def _denoiser(self, index: int) -> LoopedDenoiser:
        block = self.block(index)
        assert isinstance(block, LoopedBlock)
        return LoopedDenoiser(index, block, self.shared, self.config, self._flex)

    @property
    def loop(self) -> LoopedBlock:
        block = self.block(0)
        assert isinstance(block, LoopedBlock)
        return block

    def inference_layers(self, iterations: int) -> int:
        """Layer applications per token that is written: below the highest level a row runs on its walk and with its
        token."""
        prelude, core, coda = (len(self.loop.spans[part]) for part in ("prelude", "core", "coda"))
        return costs.walked_inference(prelude, core, coda, iterations)

    def summary(self) -> str:
        """A table: part, layers, how often they are applied, parameters; and layer applications per token."""
        levels = self.partition.levels
        facts = f"noise range {levels.highest:.4g} to {levels.lowest:.4g} ({levels.unit}), shared by K iterations"
        shared = sum(p.numel() for p in self.shared.parameters())
        more = [("shared", ", ".join(self.shared), "", f"{shared:,}")] if shared else []
        layers, each = len(self.loop.layers), (self.inference_layers(2) - self.inference_layers(1))
        per_token = f"layers per token: {layers} in training; {layers} + {each} (K - 1) with K iterations at inference"
        return f"{self.loop.table(['core', 'coda'], more)}\n{facts}\n{per_token}"

    def start_from(self, folder: str | Path) -> None:
        description = read_description(folder)
        if description.get("kind") == KIND:
            raise UserError(
                f"{folder} holds a looped network that was trained by unrolling, no denoiser (method diffusionblocks)"
            )
        check_parts(folder, description, self.config)
        super().start_from(folder)


def check_parts(folder: str | Path, description: Mapping[str, Any], config: BlocksConfig) -> None:
    """Raises UserError where saved layers have other parts in the loop: their names would not tell."""
    own = config.prelude, config.coda
    theirs = tuple(description.get("blocks", {}).get(name, 0) for name in ("prelude", "coda"))
    if own != theirs:
        raise UserError(
            f"{folder} has looped.prelude and looped.coda {theirs[0]} and {theirs[1]}, this network {own[0]} and "
            f"{own[1]}"
        )
