"""Writing a text token by token, on keys and values that are kept: every clean token passes a network once.

A reader reads clean tokens and draws the next one. `OrdinaryReader` runs a language model of transformers;
`BlocksReader` walks the noise levels of blocks, one block per level.

Shapes: N texts, P tokens read at once, D width, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusionblocks.blocks.causal import CausalBlocks
from diffusionblocks.networks.attention import View, cache_argument, causally
from diffusionblocks.seeds import normal_like
from diffusionblocks.theory import grids
from diffusionblocks.theory.categorical import ancestral
from diffusionblocks.theory.choice import TokenChoice, draw
from diffusionblocks.theory.ode import euler
from diffusionblocks.theory.precondition import coefficients
from diffusionblocks.theory.sampler import DenoiserOutput


class Reader(Protocol):
    """Reads clean tokens [N, P] and draws the next one of every text [N]. layer_evaluations: forward passes of a layer
    on a row, so far."""

    layer_evaluations: int

    def read(self, tokens: Tensor) -> None: ...

    def next(self, generator: torch.Generator | None = None) -> Tensor: ...


class OrdinaryReader:
    """network: a causal language model of transformers."""

    def __init__(self, network: Any, choice: TokenChoice) -> None:
        self.network, self.choice = network, choice
        self.layer_evaluations = 0
        self._kept: Any = None
        self._cache = cache_argument(type(network).forward)
        self._logits: Tensor | None = None

    def read(self, tokens: Tensor) -> None:
        """tokens [N, P], after those that were read before."""
        from transformers import DynamicCache

        if self._kept is None:
            self._kept = DynamicCache(config=self.network.config)
        kept = {self._cache: self._kept}
        self._logits = self.network(input_ids=tokens, use_cache=True, logits_to_keep=1, **kept).logits[:, -1]
        self.layer_evaluations += tokens.numel() * self.network.config.num_hidden_layers

    def next(self, generator: torch.Generator | None = None) -> Tensor:
        """The next token of every text [N]."""
        assert self._logits is not None, "read a token first"
        return self.choice(self._logits, generator)


class BlocksReader:
    """Blocks write a token from pure noise: at each level the block that owns it runs on one noisy row.

    With a Bayes readout, a level draws v from p(v | x, z), where temperature, top-k and top-p shape p(v | x) and the
    evidence in z stays as it is: the walk is exact for the shaped distribution, at any number of levels.

    Args:
        sampler: `categorical` (see `theory.categorical`) or `euler` ([DB]). steps: levels; 0 = one per block.
    """

    def __init__(self, model: CausalBlocks, choice: TokenChoice, sampler: str = "categorical", steps: int = 0) -> None:
        self.model, self.choice, self.sampler = model, choice, sampler
        linear = model.config.readout == "linear"
        grid = grids.equal_mass if linear else grids.equal_mass_tops
        self.levels = grid(model.partition.levels, steps or model.num_blocks)
        self.owners = [int(model.partition.block_of(torch.tensor(level))) for level in self.levels]
        self._caches = [Cache() for _ in range(model.num_blocks)]
        self._raw: list[Tensor] = []
        self._length, self._texts = 0, 0
        self.layer_evaluations = 0

    def read(self, tokens: Tensor) -> None:
        """tokens [N, P], after those that were read before. All but the first reading are of one token each."""
        count, self._texts = tokens.shape[1], len(tokens)
        assert not self._length or count == 1, "tokens in the middle are read one by one"
        positions = torch.arange(self._length, self._length + count, device=tokens.device)[None]
        batch = {"input_ids": tokens, "positions": positions}
        hidden: Tensor | None = None
        self._raw = []
        for index in range(self.model.num_blocks):
            denoiser, cache = self.model.denoiser(index), self._caches[index]
            if hidden is None or self.model.config.context == "input":
                hidden = denoiser.part("stem")(batch)
            view = (
                View(positions, causal=True, cache=cache)
                if count == 1
                else causally(batch, hidden)._replace(cache=cache)
            )
            if self.model.config.context == "features":
                hidden = denoiser.block("trunk", hidden, view)
            last = denoiser.block("read", hidden, None, 0, view)
            if not denoiser.reads_noise:
                self._raw.append(denoiser.head()(last[:, -1]))
            self.layer_evaluations += tokens.numel() * (len(denoiser.block.layers) + len(denoiser.block.head))
        self._length += count

    def next(self, generator: torch.Generator | None = None) -> Tensor:
        """The next token of every text [N]."""
        target = self.model.denoiser(0).target
        drawn: list[Tensor] = []

        def choose(logits: Tensor, generator: torch.Generator | None) -> Tensor:
            drawn.append(draw(logits, generator))
            return drawn[-1]

        def denoise(z: Tensor, level: float) -> DenoiserOutput:
            block = self.owners[self.levels.index(level)]
            raw = self._raw[block] if self._raw else self._noisy(block, z, level)
            shaped = self.choice.shaped(raw) if target.bayes or self.sampler == "categorical" else raw
            logits = target.logits(shaped, z, torch.full((len(z),), level, device=z.device))
            drawn[:] = [] if self.sampler == "categorical" else [logits]
            return DenoiserOutput(target.estimate(logits), raw, logits)

        z = normal_like(target.rows.new_empty(self._texts, target.rows.shape[1]), generator) * self.levels[0]
        if self.sampler == "categorical":
            ancestral(target, choose)(denoise, z, [*self.levels, 0.0], generator=generator)
            return drawn[-1]
        euler(denoise, z, [*self.levels, 0.0], generator=generator)
        return draw(drawn[0], generator) if target.bayes else self.choice(drawn[0], generator)

    def _noisy(self, block: int, z: Tensor, level: float) -> Tensor:
        """What a block says of z [N, D] beside the clean tokens that it has read: raw logits [N, V]."""
        denoiser, cache = self.model.denoiser(block), self._caches[block]
        sigma = torch.full((len(z),), level, device=z.device)
        positions = torch.full((1, 1), self._length, device=z.device)
        row = denoiser.enter(z[:, None], sigma, positions)
        with cache.only_read():
            hidden = denoiser.block(
                "read", row, coefficients(sigma).noise, 0, View(positions, causal=True, cache=cache)
            )
        self.layer_evaluations += len(z) * len(denoiser.block.reader)
        return denoiser.head()(hidden[:, 0])


class Cache:
    """Keys and values of every layer [N, heads, tokens, head width], as the layers of transformers use a cache."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._reading = False

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if layer in self._kept:
            before = self._kept[layer]
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        if not self._reading:
            self._kept[layer] = keys, values
        return keys, values

    def crop(self, tokens: int) -> None:
        """Forgets all but the first `tokens`."""
        self._kept = {
            layer: (keys[:, :, :tokens], values[:, :, :tokens]) for layer, (keys, values) in self._kept.items()
        }

    @contextmanager
    def only_read(self) -> Iterator[None]:
        """While this is open, what comes in is used and not kept."""
        self._reading = True
        try:
            yield
        finally:
            self._reading = False
