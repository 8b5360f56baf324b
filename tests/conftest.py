"""Small networks and data that every test can afford."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeiTConfig,
    DeiTForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

import diffusionblocks as dblocks
from diffusionblocks.data.images.splits import ImageData
from tests.second_device.device import register

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

# Where tests/second_device runs: `sim`, the device of the same folder, or a card (`cuda`). It is then what
# `--device auto` finds.
DEVICE = os.environ.get("DIFFUSIONBLOCKS_TEST_DEVICE", "")
if DEVICE == "sim":
    register()

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=6,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=8,
    patch_size=4,
    num_channels=1,
    num_labels=4,
)


def make_vit(**changes) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**{**SIZES, **changes}))


def make_deit(**changes) -> DeiTForImageClassification:
    torch.manual_seed(0)
    return DeiTForImageClassification(DeiTConfig(**{**SIZES, **changes}))


def make_dit(**changes):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=6, sample_size=8, patch_size=2)
    return DiTTransformer2DModel(**{**sizes, "num_embeds_ada_norm": 4, **changes})


def make_autoencoder(folder) -> str:
    """A tiny autoencoder that halves images, its latents scaled to unit variance on digits."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes = dict(in_channels=1, out_channels=1, latent_channels=2, norm_num_groups=2, layers_per_block=1)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    network = AutoencoderKL(**sizes, **kinds, block_out_channels=(4, 4))
    digits = dblocks.load_images(dblocks.DataConfig()).train.__getitems__(list(range(200)))["pixel_values"]
    with torch.no_grad():
        spread = network.encode(digits).latent_dist.mean.std().item()
    network.register_to_config(scaling_factor=1 / spread)
    network.save_pretrained(folder)
    return str(folder)


TOKENS = dict(
    vocab_size=13,
    hidden_size=16,
    num_hidden_layers=6,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    mask_token_id=12,
)


def make_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TOKENS, "pad_token_id": None, **changes}))


def make_bert(**changes) -> BertForMaskedLM:
    torch.manual_seed(0)
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None}
    return BertForMaskedLM(BertConfig(**{**TOKENS, **quiet, **changes}))


def make_roberta(**changes) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    return RobertaForMaskedLM(RobertaConfig(**{**TOKENS, "pad_token_id": 1, **changes}))


def make_gpt2(**changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, n_embd=16, n_layer=6, n_head=2, n_positions=32, mask_token_id=12)
    quiet = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **quiet, **changes}))


def make_neox(**changes) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**TOKENS, **changes}))


class Counting(torch.utils.data.Dataset):
    """Texts that count: token i + 1 follows i, modulo 12, from anywhere. Items hold input_ids [length]."""

    def __init__(self, count: int = 48, length: int = 16) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": (torch.arange(self.length) + 5 * index) % 12}


def make_data(count: int = 48, num_labels: int = 4) -> ImageData:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % num_labels
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
    for index, label in enumerate(labels):  # a bright quadrant tells the class
        row, column = divmod(int(label), 2)
        images[index, 0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 180
    return ImageData(images.to(torch.uint8), labels)


# Every kind of conversion; the laws hold for all of them.
CONVERSIONS = {
    "default": {},
    "input-add": {"context": "input", "target_entry": "add", "shared": "copies", "condition_width": 8},
    "features-head": {"context": "features", "target_entry": "add", "head_layers": 1, "condition_width": 8},
    "features": {"context": "features", "target_entry": "none"},
    "paper": {
        "context": "input",
        "target_entry": "replace",
        "readout": "linear",
        "target_table": "trained",
        "shared": "trained",
        "levels": "log-normal",
        "condition_width": 8,
    },
}


@pytest.fixture(params=CONVERSIONS, ids=list(CONVERSIONS))
def conversion(request) -> dict:
    return CONVERSIONS[request.param]


@pytest.fixture
def data() -> ImageData:
    return make_data()


def config(**changes) -> dblocks.TrainingConfig:
    return dblocks.TrainingConfig(**{"steps": 4, "batch_size": 8, "device": "cpu", "branch_at": 0.0, **changes})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
