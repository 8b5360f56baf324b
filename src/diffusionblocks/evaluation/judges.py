"""What generated texts are like: by themselves, and as another language model sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.errors import UserError, first_line
from diffusionblocks.networks.readout import chunked_cross_entropy
from diffusionblocks.training.task import Metric, mean_with_error


def entropy(tokens: Sequence[int]) -> float:
    """Of the distribution of tokens inside one text, nats."""
    counts = torch.tensor(list(Counter(tokens).values()), dtype=torch.float64)
    shares = counts / counts.sum()
    return -(shares * shares.log()).sum().item()


def distinct_2(tokens: Sequence[int]) -> float:
    """Share of pairs of neighbours that are different pairs (Li et al. 2016, arXiv 1510.03055)."""
    pairs = list(pairwise(tokens))
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def repetition(tokens: Sequence[int]) -> float:
    """Share of runs of four tokens that the text had before (seq-rep-4 of Welleck et al. 2020, arXiv 1908.04319)."""
    runs = list(zip(*(tokens[start:] for start in range(4)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def check_teacher(name: str) -> None:
    """Raises UserError unless `name` is a causal language model of transformers (by its config) with a tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        classes = AutoConfig.from_pretrained(name, trust_remote_code=False).architectures or []
        AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # as below
        raise UserError(f"cannot load the teacher {name!r}: {first_line(error)}") from None
    if not any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in classes):
        raise UserError(
            f"the teacher {name!r} is a {', '.join(classes) or 'network without a class'}, no causal language model"
        )


class Teacher:
    """A causal language model of transformers that reads texts in its own tokens. Raises UserError when it is none."""

    def __init__(self, name: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        check_teacher(name)
        try:
            model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # transformers and safetensors raise many kinds for what is damaged
            raise UserError(f"cannot load the teacher {name!r}: {first_line(error)}") from None
        self.model: Any = model.eval().to(device)
        self.longest = getattr(self.model.config, "max_position_embeddings", None) or 1024

    @torch.no_grad()
    def read(self, text: str) -> tuple[Tensor, Tensor]:
        """Its tokens of a text [T], and the last hidden states [T, D]."""
        ids = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"][: self.longest], dtype=torch.long)
        ids = ids.to(self.model.device)
        if not len(ids):
            return ids, torch.zeros(0, self.model.config.hidden_size)
        return ids, self.model.base_model(ids[None]).last_hidden_state[0]


SCALE, FEWEST = 0.2, 8  # scaling factor of MAUVE in [DB] app. E.4; texts that it needs at least


def mauve(name: str, texts: Sequence[str], real: Sequence[str], device: torch.device) -> Metric:
    """MAUVE (Pillutla et al. 2021, arXiv 2102.01454) of texts against real ones, with the features of the teacher
    `name`: its hidden state at the end of a text. 1 = alike. Raises UserError where it cannot be measured."""
    try:
        from mauve import compute_mauve
    except ImportError:
        raise UserError("evaluation.mauve needs the package mauve-text: pip install 'diffusionblocks[text]'") from None
    teacher = Teacher(name, device)
    features = []
    for group in (texts, real):
        ends = [hidden[-1].float().cpu() for _, hidden in map(teacher.read, group) if len(hidden)]
        if len(ends) < FEWEST:
            raise UserError(
                f"MAUVE needs {FEWEST} texts with something in them, got {len(ends)} (evaluation.num_samples)"
            )
        features.append(torch.stack(ends).numpy())
    found = compute_mauve(
        p_features=features[1], q_features=features[0], mauve_scaling_factor=SCALE, verbose=False, device_id=-1
    )
    return Metric(float(found.mauve), None)


@torch.no_grad()
def generative_perplexity(name: str, texts: Sequence[str], device: torch.device) -> Metric:
    """exp of the mean nats per token of the teacher `name` on texts, its own tokens; standard error over texts."""
    teacher = Teacher(name, device)
    sums, counts = [], []
    for text in texts:
        ids, hidden = teacher.read(text)
        if len(ids) < 2:
            continue
        losses = chunked_cross_entropy(hidden[:-1], teacher.model.get_output_embeddings(), ids[1:])
        sums.append(losses.double().sum().cpu())
        counts.append(len(losses))
    if not counts:
        raise UserError("the samples are too short for the teacher: none has two of its tokens")
    nats, tokens = torch.stack(sums), torch.tensor(counts, dtype=torch.float64)
    mean = nats.sum() / tokens.sum()
    spread = mean_with_error((nats - mean * tokens) / tokens.mean()).stderr
    value = mean.exp().item()
    return Metric(value, None if spread is None else value * spread)
