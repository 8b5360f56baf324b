"""`dblocks sample`: its arguments. What they do is in sample.py."""

from __future__ import annotations

import argparse
from typing import Any

from diffusionblocks.cli.command import Command, add_output, add_run, add_trust, number, overrides, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_trust(parser)
    parser.add_argument(
        "--num", type=whole_number, default=16, help="how many images, texts or test samples (default 16)"
    )
    parser.add_argument("--seed", type=whole_number, help="seed of the noise (default 0)")
    add_output(parser)
    both = parser.add_argument_group("drawing along noise levels")
    both.add_argument("--steps", type=whole_number, help="sampling steps (default: the recipe's)")
    both.add_argument(
        "--sampler",
        help="images: euler, heun, dpm-solver++ or churn; text: ancestral or confidence (default: the recipe's)",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--class", metavar="CLASS,...", help="classes to generate, by number or name (default: all in turn)"
    )
    images.add_argument("--guidance", type=number, help="scale of classifier-free guidance (default: the recipe's)")
    images.add_argument("--grid", help="spacing of the noise levels, rho or equal-mass (default: the recipe's)")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", help="text to continue; {5} in it is a blank of 5 tokens to fill in")
    text.add_argument(
        "--chat",
        action="store_const",
        const=True,
        help="the prompt is a question, which is put into the model's chat template",
    )
    text.add_argument(
        "--length", type=whole_number, help="tokens in all (default: the window, or a prompt with blanks)"
    )
    text.add_argument("--temperature", type=number, help="0 = the likeliest tokens (default: the recipe's)")
    text.add_argument("--top-p", type=number, help="share of probability to draw from (default: the recipe's)")
    text.add_argument(
        "--top-k", type=whole_number, help="number of likeliest tokens to draw from (default: the recipe's)"
    )
    text.add_argument(
        "--stop", action="append", help="end before this string; \\n is a line break (may be given several times)"
    )
    text.add_argument(
        "--stream", action="store_const", const=True, help="print one text as it is written (needs --num 1)"
    )
    looped = parser.add_argument_group("looped networks")
    looped.add_argument("--iterations", type=whole_number, help="iterations of the core (default: the recipe's)")
    looped.add_argument(
        "--early-exit",
        type=number,
        help="stop iterating when a prediction changes by at most this (KL divergence in nats)",
    )


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.cli.sample import sample

    return sample(arguments, overrides(rest))


COMMAND = Command(
    help="images or texts of a trained run, or predictions of a classifier", arguments=add_arguments, run=run
)
