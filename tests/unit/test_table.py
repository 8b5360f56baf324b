"""Numbers of the comparison table show what their errors leave of them."""

import pytest

from diffusionblocks.report.table import columns

PEAK = {"total": 2**20}
COUNTS = {"num_blocks": 1, "layer_evaluations": 10.0, "samples_seen": 10.0, "wall_seconds": 1.0, "peak_memory": PEAK}


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (97.591, 0.214, "97.59 ± 0.21"),
        (2.9448, 0.0079, "2.945 ± 0.008"),
        (0.17034, 0.00036, "0.1703 ± 0.0004"),
        (2.5, 0.0, "2.50 ± 0.00"),
        (0.25, None, "0.250"),
    ],
)
def test_digits_follow_the_error(value, stderr, shown):
    result = {"method": "shallow", **COUNTS, "metrics": {"loss": {"value": value, "stderr": stderr}}}
    heads, rows = columns([result])
    assert rows[0][heads.index("loss")] == shown
