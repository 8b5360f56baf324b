"""Named changes to recipes: what every recipe of a task has."""

from __future__ import annotations

from typing import Any

# What only the blocks of pretrained language models have.
_OF_PRETRAINED = {"head_start": "fresh", "distill": False, "ordinary": 0.0}

# What the paper describes and its released code does ([DB] sections 3 and 5, app. E), by task.
_PAPER: dict[str, dict[str, Any]] = {
    "classification": {
        "blocks": {
            "context": "input",
            "target_entry": "replace",
            "readout": "linear",
            "target_table": "trained",
            "shared": "trained",
            "levels": "log-normal",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "overlap": 0.05,
            "head_layers": 0,
            "condition_width": 64,
        },
        "task": {"sampler": "euler", "decision": "final"},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "image-generation": {
        "blocks": {"shared": "trained", "levels": "log-normal", "sigma_min": 0.002, "sigma_max": 80.0, "overlap": 0.05},
        "task": {"sampler": "euler", "sampling_steps": 50, "grid": "rho", "guidance": 2.0, "label_dropout": 0.1},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "masked-lm": {
        "blocks": {"shared": "trained", "schedule": "linear", "overlap": 0.1, "condition_width": 64},
        "task": {"masking": "independent", "loss_weight": "bound"},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "causal-lm": {
        "blocks": {
            "context": "input",
            "target_entry": "replace",
            "readout": "linear",
            "target_table": "trained",
            "shared": "trained",
            "levels": "log-normal",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "overlap": 0.1,
            "head_layers": 0,
            "condition_width": 64,
            **_OF_PRETRAINED,
        },
        "task": {"sampler": "euler"},
        "train": {"order": "random", "branch_at": 0.0},
    },
    "recurrent-lm": {
        "blocks": {
            "readout": "linear",
            "target_table": "trained",
            "shared": "trained",
            "levels": "log-normal",
            "sigma_min": 0.002,
            "sigma_max": 80.0,
            "condition_width": 64,
        },
        "task": {"sampler": "euler"},
    },
}

# Named changes that every recipe of a task has.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {kind: {"paper": changes} for kind, changes in _PAPER.items()}
PRESETS["causal-lm"] |= {
    # Every block reads the tokens; levels by information, exact evidence in the readout, ancestral sampling.
    "information": {
        "blocks": {
            "context": "input",
            "target_entry": "none",
            "readout": "bayes",
            "target_table": "fixed",
            "shared": "copies",
            "levels": "information",
            "least_hidden": 0.65,
            "overlap": 0.05,
            "head_layers": 0,
            "condition_width": 0,
            **_OF_PRETRAINED,
        },
        "task": {"sampler": "categorical"},
    },
    # Blocks on features of one another; the last one answers, and all of them are an ordinary language model. Hardly
    # any evidence (each is a complete predictor) and one readout for all measure best. A head layer (local.head_layers
    # 1) helps at equal samples and costs memory and a third more computation (docs/LOG.md).
    "features": {
        "blocks": {
            "context": "features",
            "target_entry": "none",
            "readout": "bayes",
            "target_table": "fixed",
            "shared": "trained",
            "levels": "information",
            "least_hidden": 0.97,
            "overlap": 0.05,
            "head_layers": 0,
            "condition_width": 0,
            **_OF_PRETRAINED,
        },
        "train": {"order": "sweep", "branch_at": 0.0},
    },
}
