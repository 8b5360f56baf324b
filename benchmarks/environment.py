"""What a result was measured on."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from diffusionblocks.experiments.summary import git_commit, versions


def describe() -> dict[str, Any]:
    return {
        "git_commit": git_commit(),
        "versions": versions(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
