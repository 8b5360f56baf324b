"""The readout's one number and its gradient are those of the plain computation, in little memory, without waiting for a
card.

Shapes: M positions, D width, V tokens, E width of the evidence.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import diffusionblocks as dblocks
from diffusionblocks.blocks.handed import WithoutWeights
from diffusionblocks.blocks.masked import hide
from diffusionblocks.networks import readout
from diffusionblocks.networks.readout import IGNORED, TokenReadout, chunk_size, weighted_cross_entropy
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.planning.tracker import PhaseTracker
from diffusionblocks.theory import evidence as evidence_module
from diffusionblocks.theory import products
from diffusionblocks.theory.evidence import Evidence, features_in_halves, rows_in_halves
from diffusionblocks.theory.noise import unit_rows
from diffusionblocks.training.lanes import AtOnce
from diffusionblocks.training.visitors import Slots, Visitors
from tests.conftest import make_llama

M, D, V, E = 37, 8, 11, 6
NEVER = 0  # also what an ignored label is read as


def parts(bias=True, evidence=True, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(M, D, dtype=dtype, requires_grad=True)
    head = nn.Linear(D, V, bias, dtype=dtype)
    labels = torch.randint(1, V, (M,))
    labels[[3, M - 1]] = IGNORED
    weights = torch.rand(M) / M
    weights[7] = 0
    known = None
    if evidence:
        known = Evidence(torch.randn(M, E, requires_grad=True), torch.randn(V, E, requires_grad=True))
    return hidden, head, labels, weights, known


def plain(hidden, head, labels, weights, never, evidence):
    logits = head(hidden).float()
    if evidence is not None:
        logits = logits + evidence.features @ evidence.rows.T
    if never is not None:
        logits = logits.masked_fill(torch.arange(V) == never, -torch.inf)
    losses = cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return (losses * weights).sum()


def leaves(hidden, head, evidence):
    return [hidden, *head.parameters(), *(evidence or ())]


@pytest.mark.parametrize("chunks", [1, 4])  # of which the last is shorter
@pytest.mark.parametrize("never", [None, NEVER])
@pytest.mark.parametrize(("bias", "evidence"), [(True, True), (False, False)])
def test_loss_and_gradients_are_those_of_the_plain_computation(monkeypatch, chunks, never, bias, evidence):
    monkeypatch.setattr(readout, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(readout, "MOST_CHUNKS", chunks)
    hidden, head, labels, weights, known = parts(bias, evidence)
    found = weighted_cross_entropy(hidden, head, labels, weights, never, known)
    wanted = plain(hidden, head, labels, weights, never, known)
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        torch.testing.assert_close(weighted_cross_entropy(hidden, head, labels, weights, never, known), wanted)
    ours, theirs = (torch.autograd.grad(3 * loss, leaves(hidden, head, known)) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert ours[0][7].abs().max() == 0 == ours[0][3].abs().max()


@pytest.mark.parametrize("true", [False, True], ids=["autocast", "bf16-true"])
def test_in_bf16_it_errs_as_the_plain_computation_does(monkeypatch, true):
    monkeypatch.setattr(readout, "CHUNK_ELEMENTS", 1)
    dtype = torch.bfloat16 if true else torch.float32
    given = parts(dtype=dtype)
    hidden, head, labels, weights, known = given
    with torch.autocast("cpu", torch.bfloat16, enabled=not true):
        losses = weighted_cross_entropy(hidden, head, labels, weights, None, known), plain(*given[:4], None, known)
    ours, theirs = (torch.autograd.grad(loss, leaves(hidden, head, known)) for loss in losses)
    assert [g.dtype for g in ours] == [t.dtype for t in leaves(hidden, head, known)]
    exact = head.double()
    doubled = [t.detach().double().requires_grad_() for t in (hidden, *known)]
    loss = plain(doubled[0], exact, labels, weights, None, Evidence(*doubled[1:]))
    right = torch.autograd.grad(loss, [doubled[0], *exact.parameters(), *doubled[1:]])
    for one, other, true_one in zip(ours, theirs, right, strict=True):
        size = true_one.norm()
        assert (one - true_one).norm() <= 2 * (other - true_one).norm() + 1e-4 * size
        assert (one - true_one).norm() <= 0.01 * size
    assert losses[0].dtype == torch.float32


def test_what_is_frozen_gets_no_gradient_and_what_is_trained_the_same():
    hidden, head, labels, weights, known = parts()
    (wanted,) = torch.autograd.grad(weighted_cross_entropy(hidden, head, labels, weights, None, known), [hidden])
    head.requires_grad_(False)
    constant = Evidence(*(tensor.detach() for tensor in known))
    loss = weighted_cross_entropy(hidden, head, labels, weights, None, constant)
    held = sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors if tensor is not None)
    assert held == hidden.numel()
    loss.backward()
    torch.testing.assert_close(hidden.grad, wanted)
    assert head.weight.grad is None


def test_a_tied_head_and_a_recomputed_call_have_the_plain_gradient():
    hidden, head, labels, weights, _ = parts(evidence=False)
    embed = nn.Embedding(V, D, _weight=head.weight)
    tokens = labels.clamp(min=0)

    def loss(of):
        return of(embed(tokens) + hidden, head, labels, weights, None, None)

    found = checkpoint(loss, weighted_cross_entropy, use_reentrant=False)
    ours, theirs = (torch.autograd.grad(one, [embed.weight, hidden]) for one in (found, loss(plain)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_readout_whose_weights_visit_has_the_gradient_before_they_leave():
    """Nothing of the backward pass reads the head, and no graph keeps it."""
    hidden, head, labels, weights, _ = parts(evidence=False)
    module = TokenReadout(nn.LayerNorm(D), head).requires_grad_(False)
    (wanted,) = torch.autograd.grad(module(hidden, labels, weights=weights), [hidden])
    slots = Slots(torch.device("cpu"), AtOnce())
    kept = WithoutWeights(module.parameters())
    with Visitors([module], slots), kept:
        loss = module(hidden, labels, weights=weights)
    assert not any(tensor.shape == head.weight.shape for tensor in kept.saved())
    room = slots.room(0, {})[torch.float32]
    assert len(room) >= head.weight.numel()
    room.detach()[2 * 64 :].fill_(torch.nan)  # where the head had come to, behind the two of the norm
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden])[0], wanted)


def test_exact_reads_out_once_in_the_step_of_every_block():
    model = dblocks.BlockCoordinateModel(take_apart(make_llama()), [range(0, 2), range(2, 4)])
    tokens = {"input_ids": torch.randint(0, 9, (2, 8))}
    calls = []
    model.readout.norm.register_forward_hook(lambda *_: calls.append(1))
    for active in range(2):
        calls.clear()
        dblocks.CausalLM().step(model, active, tokens).loss.backward()
        assert len(calls) == 1


def test_a_second_backward_pass_is_refused_rather_than_wrong():
    hidden, head, labels, weights, _ = parts(evidence=False)
    loss = weighted_cross_entropy(hidden, head, labels, weights)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class _NoWaiting(TorchDispatchMode):
    """Refuses what a card would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
        by_mask = func._schema.name.startswith("aten::index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for many in args
            if isinstance(many, list | tuple)
            for one in many
        )
        assert func._schema.name not in waits and not by_mask, func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_a_number_from_the_card():
    hidden, head, labels, weights, known = parts()
    with _NoWaiting():
        weighted_cross_entropy(hidden, head, labels, weights, NEVER, known).backward()
    model = dblocks.convert(make_llama(), 3, target="masked")
    tokens, level = torch.randint(0, 9, (2, 16)), torch.full((2,), 0.5)
    masked = hide(tokens, level, model.mask_id)
    with _NoWaiting():
        batch = {"noisy_target": masked.tokens}
        model.denoiser(1).loss(batch, level, masked.labels, masked.weights, 20).backward()
    with pytest.raises(AssertionError), _NoWaiting():  # the law can fail
        hidden[labels != IGNORED]


def test_the_logits_of_all_positions_are_never_in_memory():
    """The peak is what goes in and comes out and two chunks of logits, in fp32 and where they are cast."""
    positions, tokens, width = 4096, 1 << 15, 16
    size = chunk_size(positions, tokens)
    assert size == positions // 8
    for autocast in (False, True):
        with FakeTensorMode():
            module = TokenReadout(nn.Identity(), nn.Linear(width, tokens, bias=False))
            hidden = torch.randn(positions, width, requires_grad=True)
            labels, weights = torch.zeros(positions, dtype=torch.long), torch.rand(positions)
            tracker = PhaseTracker()
            tracker.present([module], [], [hidden, labels, weights])
            with tracker, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                module(hidden, labels, weights=weights).backward()
        kept = 2 * (hidden.nbytes + module.head.weight.nbytes)
        assert tracker.peak.total <= kept + 2 * size * tokens * 4 + 0.1 * (size * tokens * 4)
        assert tracker.peak.total > size * tokens * 4


@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("tokens", [256, 8192])
@pytest.mark.parametrize("power", [1, 3], ids=["rows alike", "rows of few numbers"])
def test_halves_keep_every_loss_within_a_thousandth_of_a_nat(tokens, width, power):
    """At every level, with what the network says beside it. Products of bf16 numbers are exact in fp64, so it stands in
    for a card."""
    generator = torch.Generator().manual_seed(0)
    rows = unit_rows(torch.randn(tokens, width, generator=generator) ** power)
    labels = torch.randint(0, tokens, (48,), generator=generator)
    says = 2 * torch.randn(48, tokens, generator=generator).double()
    halved = rows_in_halves(rows).double()
    telling = 0
    for sigma in (0.002, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 80.0):
        noisy = rows[labels] + sigma * torch.randn(48, width, generator=generator)
        features = noisy / sigma**2
        exact = cross_entropy(says + features.double() @ rows.double().T, labels, reduction="none")
        product = features_in_halves(features).double() @ halved.T
        found = cross_entropy(says + product, labels, reduction="none")
        assert (found - exact).abs().max() < 1e-3
        telling += 0.01 < exact.median() < 5
    assert telling  # at some level, tokens can just be told apart


def test_a_card_multiplies_halves_into_fp32(monkeypatch):
    """On tensors without data: one bf16 product of three halves to a chunk, none in fp32, and rows that are halved
    once."""
    monkeypatch.setattr(evidence_module, "multiplies_halves", lambda device: device.type == "cuda")
    monkeypatch.setattr(readout, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(readout, "MOST_CHUNKS", 4)
    products, joined = [], []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.dtype:
                products.append((args[0].shape[1], args[0].dtype, args[1].dtype, found.dtype))
            if func is torch.ops.aten.cat.default:
                joined.append(len(found))
            return found

    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():  # autograd wants a real card
        hidden, head = torch.randn(M, D), nn.Linear(D, V, device="meta")
        head.weight, head.bias = (nn.Parameter(torch.randn(p.shape)) for p in head.parameters())
        known = Evidence(torch.randn(M, E), torch.randn(V, E))
        labels, weights = torch.zeros(M, dtype=torch.long), torch.rand(M)
        with Seen():
            weighted_cross_entropy(hidden, head, labels, weights, None, known)
    assert products == [(3 * E, torch.bfloat16, torch.bfloat16, torch.float32)] * 4
    assert joined.count(V) == 1


def _of_a_card(monkeypatch):
    """The products that only a card has, in double precision."""
    plain_mm, plain_addmm = torch.mm, torch.addmm
    made = []

    def mm(left, right, out_dtype=None):
        made.append("mm")
        return plain_mm(left.double(), right.double()).to(out_dtype)

    def addmm(total, left, right, out_dtype=None, out=None):
        assert out is total and total.dtype == out_dtype == torch.float32
        made.append("addmm")
        return out.copy_(plain_addmm(total.double(), left.double(), right.double()))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    for module in (evidence_module, products, readout):
        monkeypatch.setattr(module, "multiplies_halves", lambda device: True)
    return made


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_narrow_products_into_fp32_err_less_than_rounded_ones(monkeypatch, device, evidence):
    """On a card they are its own; on a CPU others stand in for them."""
    if device == "cuda" and not (torch.cuda.is_available() and products.multiplies_halves(torch.device(device))):
        pytest.skip("needs a card that multiplies bf16 into fp32")
    monkeypatch.setattr(readout, "CHUNK_ELEMENTS", 1)
    hidden, head, labels, weights, known = parts(bias=False, evidence=evidence)
    hidden, labels, weights = hidden.detach().to(device).requires_grad_(), labels.to(device), weights.to(device)
    head.to(device)
    known = None if known is None else Evidence(*(t.detach().to(device).requires_grad_() for t in known))

    def gradients(narrow):
        with torch.autocast(device, torch.bfloat16, enabled=narrow):
            loss = weighted_cross_entropy(hidden, head, labels, weights, None, known)
        return [loss, *torch.autograd.grad(loss, leaves(hidden, head, known))]

    exact = gradients(False)
    with monkeypatch.context() as patch:
        for module in (evidence_module, products, readout):
            patch.setattr(module, "multiplies_halves", lambda device: False)
        rounded = gradients(True)
    made = _of_a_card(monkeypatch) if device == "cpu" else None
    found = gradients(True)
    if made is not None:  # logits and the head's gradient, in every chunk
        chunks = -(-M // chunk_size(M, V))
        assert made.count("addmm") == (2 if evidence else 1) * chunks and made.count("mm") == chunks
    for ours, theirs, right in zip(found, rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - right).norm() <= 1.1 * (theirs - right).norm() + 1e-4 * right.norm()
        assert (ours - right).norm() <= 0.01 * right.norm()


def test_one_rounded_product_would_not_do():
    """Numbers rounded to the ten bits of TF32, at a level where tokens are being told apart: why three products are
    made."""
    generator = torch.Generator().manual_seed(0)
    rows = unit_rows(torch.randn(8192, 64, generator=generator))
    labels = torch.randint(0, 8192, (128,), generator=generator)
    features = (rows[labels] + 0.2 * torch.randn(128, 64, generator=generator)) / 0.04
    rounded = [((t.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32) for t in (features, rows)]
    losses = [
        cross_entropy(f.double() @ r.double().T, labels, reduction="none") for f, r in ((features, rows), rounded)
    ]
    assert (losses[0] - losses[1]).abs().max() > 1e-3
