"""Names from data are shown in figures as they are, whatever matplotlib would make of them."""

import numpy as np
import pytest

from diffusionblocks.report import figures

PEAK = {"total": 4 << 20, **dict.fromkeys(figures.PARTS, 1 << 20)}


@pytest.mark.parametrize("name", [r"$\foo$", "$", "a $x_1$ b $", "$$", "\\$", "$\\frac{$", "naïve\udcff", "_^{}"])
def test_a_name_that_looks_like_a_formula_is_a_name(name):
    images = np.zeros((1, 4, 4), dtype=np.uint8)
    result = {"method": name, "metrics": {name: {"value": 1.0, "stderr": 0.1}}, "peak_memory": PEAK}
    drawn = [figures.samples(images, [name], [True]), figures.quality([result], name), figures.memory([result])]
    looped = {"nats_at_2": {"value": 1.0, "stderr": 0.1}, "nats_at_4": {"value": 0.9, "stderr": None}}
    drawn.append(figures.iterations([{"method": name, "metrics": looped}]))
    drawn.append(figures.losses({"0": ([1.0, 2.0], [1.0, 0.5])}, 1, name))
    for text in drawn:
        assert text.startswith("<svg")
        text.encode("utf-8")
    assert name.replace("\udcff", "?").replace("&", "&amp;") in drawn[0]
