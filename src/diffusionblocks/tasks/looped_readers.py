"""Writing with looped networks, on keys and values that are kept for every iteration.

Both readers are lazy: an iteration runs, for a row, when a prediction asks for it. A row that stopped early is taken
further once a later row goes further, so what the core keeps is the same with early exit and without. (Of an unrolled
network the coda keeps what a row had where it stopped.)

Shapes: N texts, P tokens read at once, R rows that run together, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionblocks.blocks.looped import LoopedBlock, LoopedBlocks, LoopedNetwork
from diffusionblocks.networks.attention import View
from diffusionblocks.seeds import normal_like
from diffusionblocks.tasks.readers import Cache
from diffusionblocks.theory import grids
from diffusionblocks.theory.categorical import bridge
from diffusionblocks.theory.choice import TokenChoice, draw
from diffusionblocks.theory.targets import add_noise


def grid(model: LoopedBlocks, iterations: int) -> list[float]:
    """The noise levels of so many iterations, highest first."""
    make = grids.equal_mass if model.config.readout == "linear" else grids.equal_mass_tops
    return make(model.partition.levels, iterations)


class _LoopReader:
    """What both kinds share: tokens, the prelude's output, early exit, and the count of what was done.

    Args:
        early_exit: a token's iterations end when the divergence of two successive predictions is at most this (KL,
            nats), in all texts; 0 = never.
    """

    def __init__(self, loop: LoopedBlock, choice: TokenChoice, iterations: int, early_exit: float) -> None:
        self.loop, self.choice, self.iterations, self.early_exit = loop, choice, iterations, early_exit
        self.layer_evaluations = 0
        self.exits: list[int] = []  # iterations that each token took
        self._prelude = Cache()
        self._kept = [Cache() for _ in range(iterations)]
        self._tokens = torch.zeros(0, 0, dtype=torch.long)
        self._injected = torch.zeros(0, 0, 0)

    def _stem(self, tokens: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, tokens: Tensor) -> None:
        """tokens [N, P], after those that were read before."""
        first = self._injected.shape[1]
        hidden = self._stem(tokens, torch.arange(first, first + tokens.shape[1], device=tokens.device)[None])
        injected = self._run("prelude", self._prelude, first, hidden)
        self._tokens = torch.cat([self._tokens.to(tokens), tokens], 1) if first else tokens
        self._injected = torch.cat([self._injected, injected], 1) if first else injected

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self._injected.shape[1]

    def _run(self, use: str, cache: Cache, first: int, *inputs: Tensor | None) -> Tensor:
        """`use` of the loop on rows from number `first` on; the cache holds those before. inputs: hidden states
        [N, R, D], ..."""
        assert inputs[0] is not None
        texts, rows = inputs[0].shape[:2]
        self.layer_evaluations += texts * rows * len(self.loop.spans[use])
        return self.loop(use, *inputs, _after(first, rows, cache, inputs[0]))

    def _settled(self, now: Tensor, before: Tensor | None) -> bool:
        """Whether a prediction, logits [N, V], is still what it was an iteration ago."""
        if before is None or self.early_exit <= 0:
            return False
        p, q = now.float().log_softmax(-1), before.float().log_softmax(-1)
        inside = p > -torch.inf
        gap = torch.where(inside, p - q, torch.zeros_like(p))
        return bool(((p.exp() * gap).sum(-1) <= self.early_exit).all())


class UnrolledReader(_LoopReader):
    """A looped network that was trained by unrolling: K iterations from a random state for every token."""

    def __init__(self, model: LoopedNetwork, choice: TokenChoice, iterations: int, early_exit: float = 0.0) -> None:
        super().__init__(model.loop, choice, iterations, early_exit)
        self.model = model
        self._coda, self._done = Cache(), 0  # rows whose last state was read out
        self._seen = [0] * iterations  # rows that each iteration has run on ...
        self._waiting: list[Tensor | None] = [None] * (iterations + 1)  # ... and the states that it has not run on yet

    def _stem(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert self.model.loop.stem is not None
        return self.model.loop.stem({"input_ids": tokens, "positions": positions})

    def next(self, generator: torch.Generator | None = None) -> Tensor:
        """The next token of every text [N]."""
        fresh = self._injected[:, self._done :]
        self._add(0, normal_like(fresh, generator))
        logits, before = None, None
        for number in range(self.iterations):
            self._iterate(number)
            last = number == self.iterations - 1
            if last or self.early_exit > 0:
                before, logits = logits, self._read_out(number)
                if last or self._settled(logits, before):
                    break
                self._coda.crop(self._done)
        assert logits is not None
        self._done = self.length
        self.exits.append(number + 1)
        return self.choice(logits, generator)

    def _add(self, number: int, states: Tensor) -> None:
        """States that iteration `number` is to go on from."""
        waiting = self._waiting[number]
        self._waiting[number] = states if waiting is None else torch.cat([waiting, states], 1)

    def _iterate(self, number: int) -> None:
        """One iteration, on all rows that it has not run on."""
        states, first = self._waiting[number], self._seen[number]
        assert states is not None
        out = self._core(number, first, states)
        self._waiting[number], self._seen[number] = None, self.length
        self._add(number + 1, out)

    def _core(self, number: int, first: int, states: Tensor) -> Tensor:
        return self._run("core", self._kept[number], first, states, self._injected[:, first:], None)

    def _read_out(self, number: int) -> Tensor:
        """Logits [N, V] of the last row, after iteration `number`. The rows since the last prediction pass the coda."""
        states = self._waiting[number + 1]
        assert states is not None
        hidden = self._run("coda", self._coda, self._done, states[:, self._done - self.length :], None)
        return self.model.readout(hidden[:, -1])


class LevelsReader(_LoopReader):
    """A looped network that was trained as a denoiser: a token walks K noise levels, one iteration each.

    Rows before the last hold noisy versions of the tokens that were written, as in training: below the highest level,
    where all is noise, a row runs once on its walk and once more when its token is known. With a Bayes readout
    temperature, top-k and top-p shape p(v | x, state), and the evidence in z stays as it is.

    Args:
        sampler: `categorical` (draws v, and goes on with `theory.categorical.bridge`) or `euler` ([DB]: along the
            estimate).
    """

    def __init__(
        self,
        model: LoopedBlocks,
        choice: TokenChoice,
        iterations: int,
        early_exit: float = 0.0,
        sampler: str = "categorical",
    ) -> None:
        super().__init__(model.loop, choice, iterations, early_exit)
        self.denoiser, self.sampler = model.denoiser(0), sampler
        self.levels = grid(model, iterations)
        self._seen = [0] * iterations  # rows of each level whose own token is known

    def _stem(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.denoiser.part("stem")({"input_ids": tokens, "positions": positions})

    def next(self, generator: torch.Generator | None = None) -> Tensor:
        """The next token of every text [N]."""
        target, texts = self.denoiser.target, len(self._tokens)
        z = normal_like(target.rows.new_empty(texts, target.rows.shape[1]), generator) * self.levels[0]
        token, before = None, None
        for number, level in enumerate(self.levels):
            raw = self._denoise(number, z, generator)
            shaped = self.choice.shaped(raw) if target.bayes or self.sampler == "categorical" else raw
            logits = target.logits(shaped, z, torch.full((texts,), level, device=z.device))
            last = number == self.iterations - 1 or self._settled(logits, before)
            if last or self.sampler == "categorical":
                token = (
                    draw(logits, generator)
                    if target.bayes or self.sampler == "categorical"
                    else self.choice(logits, generator)
                )
            if last:
                break
            following, before = self.levels[number + 1], logits
            if self.sampler == "euler":
                estimate = target.estimate(logits)
                z = estimate + following / level * (z - estimate)
            else:
                assert token is not None
                z = bridge(z, target.clean(token), level, following, generator=generator)
        assert token is not None
        self.exits.append(number + 1)
        return token

    def _denoise(self, number: int, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Raw logits [N, V] of the last row, for its z [N, D] at level `number`. Rows before it that this level has not
        met run beside it, and are kept."""
        first, level = self._seen[number], self.levels[number]
        sigma = torch.full((len(z),), level, device=z.device)
        known = self.denoiser.target.clean(self._tokens[:, first + 1 :])
        noisy = torch.cat([add_noise(known, sigma, generator=generator), z[:, None]], 1)
        condition, injected = self.denoiser.condition(sigma), self._injected[:, first:]
        state = self._run("core", self._kept[number], first, noisy.to(injected), injected, condition)
        hidden = self._run("coda", self._kept[number], first, state, condition)
        self._seen[number] = self.length - (number > 0)
        self._kept[number].crop(self._seen[number])  # the last row's token is not known yet
        return self.denoiser.head()(hidden[:, -1])


def _after(first: int, rows: int, cache: Cache, like: Tensor) -> View:
    """Of `rows` rows behind `first` that the cache holds: each attends to all rows up to itself. like: hidden states;
    the mask gets their type."""
    positions = torch.arange(first, first + rows, device=like.device)[None]
    if rows == 1:
        return View(positions, causal=True, cache=cache)
    allowed = positions[0, :, None] >= torch.arange(first + rows, device=like.device)
    mask = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
    mask = mask.masked_fill(~allowed, torch.finfo(like.dtype).min)[None, None]
    return View(positions, mask, causal=True, cache=cache)
