"""Copies between host and device that happen at the worst moment that their order allows change nothing."""

from __future__ import annotations

import pytest
import torch

from diffusionblocks.training import residency
from tests.conftest import DEVICE, weights
from tests.second_device.cases import CASES

pytestmark = pytest.mark.skipif(DEVICE != "sim", reason="a card decides itself when a copy happens")


class Late:
    """Lanes in which a copy is made as late as possible: when something waits for it. The lane `eager` makes its copies
    at once instead, as soon as what they come after allows. Meanwhile the place that a copy goes to holds NaN."""

    def __init__(self, eager: str | None = None) -> None:
        self.eager, self.asked = eager, {"up": [], "down": []}
        self.made = {"up": 0, "down": 0}
        self.most = 0  # copies that waited together

    def mark(self):
        return None  # the device computes at once

    def copy(self, lane, pairs, after, *, slow=False):
        for into, _ in pairs:
            if into.is_floating_point() and lane == "up":
                self._spoil(into)
        self.asked[lane].append((pairs, [event for event in after if event is not None]))
        event = lane, len(self.asked[lane])
        if lane == self.eager:
            self.finish(event)
        self.most = max(self.most, sum(len(self.asked[each]) - self.made[each] for each in self.asked))
        return event

    def _spoil(self, into):
        """Not where a copy that comes before is still to read."""
        waiting = [pair for pairs, _ in self.asked["down"][self.made["down"] :] for pair in pairs]
        if not any(_overlap(source, into) for _, source in waiting):
            with torch.no_grad():
                into.fill_(float("nan"))

    def wait(self, event):
        self.finish(event)

    @torch.no_grad()
    def finish(self, event):
        if event is None:
            return
        lane, number = event
        while self.made[lane] < number:
            pairs, after = self.asked[lane][self.made[lane]]
            for before in after:
                self.finish(before)
            for into, source in pairs:
                into.copy_(source)
            self.made[lane] += 1


def _overlap(one, other):
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    starts = sorted([(one.storage_offset(), len(one)), (other.storage_offset(), len(other))])
    return starts[0][0] + starts[0][1] > starts[1][0]


@pytest.mark.parametrize("eager", [None, "up", "down"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("labels default", {"order": "random"}),
        ("labels features", {"order": "sweep", "visit_steps": 2, "ema_decay": 0.9}),
        ("labels default", {"order": "cyclic", "branch_at": 0.5}),
        ("tokens exact", {}),
        ("tokens mixed", {"order": "random"}),
    ],
)
@pytest.mark.parametrize("prefetch", [False, True])
def test_when_copies_happen_changes_nothing(name, options, prefetch, eager, device, monkeypatch):
    case, made = CASES[name], []
    plain = case.trainer(device=str(device), residency="device", steps=4, **options)
    plain.fit()
    with monkeypatch.context() as patch:
        patch.setattr(residency, "lanes_of", lambda device: made.append(Late(eager)) or made[-1])
        moved = case.trainer(device=str(device), residency="host", steps=4, **options)
        moved.place.prefetch = prefetch
        moved.fit()
    assert moved.residency.prefetches is prefetch
    assert made[0].most > (1 if eager is None else 0)
    for name, tensor in weights(plain.model).items():
        assert torch.equal(moved.model.state_dict()[name].cpu(), tensor.cpu()), name
