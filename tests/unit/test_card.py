"""What a card does differently, as far as memory goes."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from diffusionblocks.planning.card import (
    CONTEXT,
    attention_kernel,
    kernels_of_a_card,
    needed,
    target_device,
    traced_device,
    usable,
    workspaces,
)

MIB = 1 << 20


def saved(dtype=torch.float32, kv_heads=4, mask=False, dropout=0.0):
    """Shapes of what attention of 4 heads over 16 positions keeps for its backward pass, counted as on a card."""
    query = torch.randn(2, 4, 16, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, 16, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    options = {"enable_gqa": kv_heads != 4, "dropout_p": dropout}
    if mask:
        options["attn_mask"] = torch.zeros(16, 16, dtype=dtype)
    kept = []
    with kernels_of_a_card(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.scaled_dot_product_attention(query, key, value, **options)
    return [tuple(tensor.shape) for tensor in kept]


def keeps_the_softmax(shapes):
    return any(shape[-2:] == (16, 16) and len(shape) > 2 for shape in shapes)


def test_grouped_keys_keep_their_softmax_in_fp32_and_under_a_mask():
    """No fused kernel of a card takes them; everything else has one."""
    for dtype, kv_heads, mask in itertools.product((torch.float32, torch.bfloat16), (4, 2), (False, True)):
        expected = kv_heads == 2 and (dtype == torch.float32 or mask)
        assert keeps_the_softmax(saved(dtype, kv_heads, mask)) == expected, (dtype, kv_heads, mask)


def test_autocast_decides_the_kernel():
    with torch.autocast("cpu", torch.bfloat16):
        assert not keeps_the_softmax(saved(kv_heads=2))


def test_dropout_of_attention_keeps_nothing_on_a_card():
    """The CPU has no fused kernel with dropout and would keep three matrices of scores."""
    assert saved(dropout=0.1) == saved()


def test_attention_has_the_same_values_within():
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8)
    plain = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    with kernels_of_a_card():
        same = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    assert torch.allclose(plain, same, atol=1e-5)
    with pytest.raises(ZeroDivisionError), kernels_of_a_card():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention  # nothing stays behind


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a card for its choice")
def test_a_card_chooses_the_same_kernels():
    for dtype, kv_heads, masked in itertools.product((torch.float32, torch.bfloat16), (4, 2), (False, True)):
        query = torch.randn(2, 4, 64, 32, dtype=dtype, device="cuda", requires_grad=True)
        key = torch.randn(2, kv_heads, 64, 32, dtype=dtype, device="cuda", requires_grad=True)
        mask = torch.zeros(64, 64, dtype=dtype, device="cuda") if masked else None
        grouped = kv_heads != 4
        chosen = torch._fused_sdp_choice(query, key, key, mask, enable_gqa=grouped)
        is_math = chosen == torch.nn.attention.SDPBackend.MATH.value
        assert is_math == (attention_kernel(dtype, grouped=grouped, masked=masked) == "math"), (dtype, grouped, masked)


def test_workspaces_are_those_of_two_threads():
    assert workspaces("cuda", (9, 0), {}) == workspaces("cuda", None, {}) == 64 * MIB
    assert workspaces("cuda", (8, 9), {}) == 2 * (2 * 4096 + 8 * 16) * 1024  # torch's own ":4096:2:16:8"
    assert workspaces("cuda", (9, 0), {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) == 64 * MIB
    assert workspaces("cuda", (9, 0), {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}) == 256 << 10
    assert workspaces("cpu", None, {}) == 0


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_needed_is_the_smallest_memory_that_is_usable_for_it(target):
    for allocated in (0, 1, 10 * MIB + 7, 3 << 30, 70 << 30):
        need = needed(allocated, target)
        assert usable(need, target) >= allocated
        assert usable(need - 4, target) < max(allocated, 1)
    assert usable(CONTEXT // 2, "cuda") == 0


def test_a_plan_is_for_the_card_where_one_is_meant(monkeypatch):
    assert target_device("cuda:1") == "cuda"
    assert target_device("cpu", for_a_card=True) == "cpu"
    assert target_device("auto", for_a_card=True) == "cuda"
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        assert target_device("auto") == ("cuda" if here else "cpu")
        for built in (True, False):  # on fake CUDA tensors, autograd of a build without CUDA ends the process
            monkeypatch.setattr(torch.backends.cuda, "is_built", lambda built=built: built)
            assert traced_device("cuda") == ("cuda" if here and built else "cpu")
            assert traced_device("mps") == traced_device("cpu") == "cpu"
