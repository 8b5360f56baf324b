"""What a pretrained model can do without training: the methods `prompt` and `retrieval`.

Both put tokens before a text and score the text's own tokens, the same ones that every other method is scored on, so
their nats compare. `prompt` takes the same training examples for every text. `retrieval` takes the passages of the
training text that BM25 (Robertson and Zaragoza 2009) finds best for what stands before a stretch of the text, anew for
every stretch (in-context RALM, Ram et al. 2023, arXiv 2302.00083); in conversations the query is what stands before the
first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusionblocks.blocks.model import BlockModel, EndToEndModel
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import TextData
from diffusionblocks.data.text.tokenizers import Tokenizer
from diffusionblocks.errors import UserError
from diffusionblocks.methods.original import Original
from diffusionblocks.networks.readout import IGNORED
from diffusionblocks.recipes import Recipe
from diffusionblocks.recipes.schema import InContextConfig


class Stretch(NamedTuple):
    """Tokens [start, end) of window number `window`, scored after the same context."""

    window: int
    start: int
    end: int


class Passages:
    """Pieces of a training text: documents where they are padded (conversations), else pieces of `settings.passage`
    tokens.

    Raises UserError where the text has none.
    """

    def __init__(self, train: TextData, tokenizer: Tokenizer, settings: InContextConfig) -> None:
        self.train, self.tokenizer, self.settings = train, tokenizer, settings
        spans = train.spans
        if train.packing != "padded":
            starts = [np.arange(start, end, settings.passage) for start, end in spans]
            ends = [np.minimum(begin + settings.passage, end) for begin, (_, end) in zip(starts, spans, strict=True)]
            spans = np.stack([np.concatenate(starts), np.concatenate(ends)], 1)
        self.spans = spans[spans[:, 1] - spans[:, 0] <= settings.tokens]
        if not len(self.spans):
            raise UserError(f"no training example has at most in_context.tokens {settings.tokens} tokens")
        self._index: Any = None

    def tokens(self, number: int) -> np.ndarray:
        start, end = self.spans[number]
        return np.asarray(self.train.tokens[start:end], dtype=np.int64)

    def together(self, numbers: Sequence[int]) -> np.ndarray:
        """As many of these as fit, the first (the best) last, next to the text."""
        chosen: list[np.ndarray] = []
        room = self.settings.tokens
        for number in numbers:
            piece = self.tokens(number)
            if len(piece) <= room:
                chosen.insert(0, piece)
                room -= len(piece)
        return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)

    def examples(self) -> np.ndarray:
        """The same examples for every text, evenly from all."""
        length = float(np.mean(self.spans[:, 1] - self.spans[:, 0]))
        count = min(len(self.spans), max(1, round(self.settings.tokens / length)))
        return self.together([index * len(self.spans) // count for index in range(count)])

    def best(self, query: np.ndarray) -> np.ndarray:
        """The passages that BM25 ranks highest for some tokens."""
        bm25s = _bm25s()
        if self._index is None:
            texts = [self.tokenizer.decode(self.tokens(number).tolist()) for number in range(len(self.spans))]
            self._index = bm25s.BM25()
            self._index.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)
        asked = bm25s.tokenize([self.tokenizer.decode(query.tolist())], stopwords=None, show_progress=False)
        if not asked.ids[0]:  # no word in it
            return np.zeros(0, np.int64)
        shortest = max(2, int(np.median(self.spans[:, 1] - self.spans[:, 0])))
        count = min(len(self.spans), 2 + 2 * self.settings.tokens // shortest)
        found, scores = self._index.retrieve(asked, k=count, show_progress=False)
        return self.together([int(number) for number, score in zip(found[0], scores[0], strict=True) if score > 0])


class InContext(Dataset):
    """Windows with a context before them -> dicts `input_ids`, `attention_mask` and `labels` [N, C + T]: only tokens of
    the windows have labels, each exactly once, and the first of a window, which no method predicts, has none.

    Args:
        split: windows of T tokens. passages: of the training text. search: put the passages that are found for a
            stretch before it; else the same examples before every window.
    """

    def __init__(self, split: TextData, passages: Passages, *, search: bool) -> None:
        self.split, self.passages, self.search = split, passages, search
        self.length = split.length + passages.settings.tokens
        self.stretches = [stretch for window in range(len(split)) for stretch in self._stretches(window)]
        self._examples = None if search else passages.examples()

    def _stretches(self, window: int) -> list[Stretch]:
        ids, labels = self._window(window)
        if not self.search:
            return [Stretch(window, 0, len(ids))]
        if self.split.answers is not None:
            answers = np.flatnonzero(labels[1:] != IGNORED)
            return [Stretch(window, int(answers[0]) + 1, len(ids))] if len(answers) else []
        stride = self.passages.settings.stride
        return [Stretch(window, start, min(start + stride, len(ids))) for start in range(0, len(ids), stride)]

    def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels [T], padding left out."""
        batch = self.split[window]
        real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(batch["input_ids"])
        return batch["input_ids"][:real].numpy(), batch.get("labels", batch["input_ids"])[:real].numpy()

    def context(self, before: np.ndarray) -> np.ndarray:
        """What stands before a text, or a stretch of it that follows `before`."""
        if self._examples is not None:
            return self._examples
        query = before if self.split.answers is not None else before[-self.passages.settings.query :]
        return self.passages.best(query) if len(query) else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = [self._row(self.stretches[index]) for index in indices]
        size = (len(rows), max(len(ids) for ids, _ in rows))
        found = {
            "input_ids": torch.zeros(size, dtype=torch.long),
            "attention_mask": torch.zeros(size, dtype=torch.long),
        }
        found["labels"] = torch.full(size, IGNORED)
        for row, (ids, labels) in enumerate(rows):
            found["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
            found["labels"][row, : len(ids)] = torch.from_numpy(labels)
            found["attention_mask"][row, : len(ids)] = 1
        return found

    def _row(self, stretch: Stretch) -> tuple[np.ndarray, np.ndarray]:
        ids, labels = self._window(stretch.window)
        context = self.context(ids[: stretch.start])
        scored = np.full(stretch.end, IGNORED, dtype=np.int64)
        first = max(1, stretch.start)
        scored[first:] = labels[first : stretch.end]
        whole = np.concatenate([context, ids[: stretch.end]])
        return whole, np.concatenate([np.full(len(context), IGNORED, dtype=np.int64), scored])


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise UserError("the method retrieval needs bm25s: pip install 'diffusionblocks[adapt]'") from None
    return bm25s


class Prompt(Original):
    name = "prompt"
    description = "as it is, with training examples before every text"
    adds_context = True
    reads = ("in_context",)
    search = False

    def check(self, recipe: Recipe, data: Any, model: BlockModel) -> None:
        assert isinstance(recipe.data, TextConfig) and isinstance(model, EndToEndModel)
        settings = recipe.in_context
        settings.check()
        if isinstance(data.train, TextData):
            Passages(data.train, data.tokenizer, settings)
            if data.train.packing == "documents":
                raise UserError(
                    f"the method {self.name} puts text before a window: set data.packing to stream or padded"
                )
        if self.search:
            _bm25s()
        longest = model.network.config.max_position_embeddings
        if settings.tokens + recipe.data.length > longest:
            raise UserError(
                f"in_context.tokens {settings.tokens} and data.length {recipe.data.length} exceed the {longest} "
                f"positions of {recipe.model.pretrained}"
            )

    def scored(self, recipe: Recipe, data: Any, split: Any) -> Any:
        return InContext(split, Passages(data.train, data.tokenizer, recipe.in_context), search=self.search)


class Retrieval(Prompt):
    name = "retrieval"
    description = "as it is, with the best passages of the training text before every text (BM25)"
    search = True


METHODS = (Prompt(), Retrieval())
