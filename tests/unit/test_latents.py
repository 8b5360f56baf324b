"""Latents: shapes, scale, cache, damage; images that are decoded when they are read; feature networks; sample files."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffusionblocks as dblocks
from diffusionblocks.data.images import latents, sources
from diffusionblocks.data.images.grid import grid, to_pixels
from diffusionblocks.data.images.latents import Autoencoder, load_data
from diffusionblocks.evaluation import features
from diffusionblocks.experiments.sample import check_file
from diffusionblocks.training.task import Asked
from tests.conftest import make_autoencoder, make_data


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder that halves images, its latents scaled to unit variance on digits."""
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def options(vae, tmp_path):
    return dict(source="digits", image_size=8, vae=vae, cache_dir=str(tmp_path / "cache"))


def test_latents_have_the_scale_of_edm_s_data(options):
    data = load_data(dblocks.DataConfig(**options))
    batch = data.train.__getitems__(list(range(500)))
    assert batch["pixel_values"].shape == (500, 2, 4, 4)
    mean, deviation = data.train.shards[0][:500, 0].float().unbind(1)
    assert mean.std().item() == pytest.approx(0.5, abs=0.05)
    drawn = (batch["pixel_values"] - mean) / deviation  # the rest is a draw from the latent's own distribution
    assert (drawn.mean().item(), drawn.std().item()) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    assert torch.equal(batch["labels"], data.train.source.labels[:500])


def test_latents_are_the_encoder_s_and_decode_to_its_images(options, vae):
    config = dblocks.DataConfig(**options)
    data, encoder = load_data(config, device="cpu"), Autoencoder(config, "cpu")
    pixels = data.test.source.pixels([3, 5])
    with torch.no_grad():
        own = encoder.network.encode(pixels.float() / 127.5 - 1).latent_dist
        image = encoder.network.decode(own.mean).sample
    mean = data.test.shards[0][[3, 5], 0, 0].float()
    torch.testing.assert_close(mean, own.mean * encoder.scale * 0.5, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(encoder.decode(mean), image, atol=2e-2, rtol=2e-2)


def test_the_cache_is_used_resumed_and_repaired(options, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(latents, "SHARD", 300)
    encoded = []
    encode = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, part: encoded.append(len(part)) or encode(self, part))
    config = dblocks.DataConfig(**options)
    first = load_data(config).train.__getitems__([0, 700])["pixel_values"]
    whole = sum(encoded)
    assert whole == 1797
    again = load_data(config).train.__getitems__([0, 700])["pixel_values"]
    assert sum(encoded) == whole  # nothing was encoded again
    assert torch.equal(first, again)
    shard = sorted((tmp_path / "cache").rglob("shard-00002.safetensors"), key=lambda path: path.stat().st_size)[-1]
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    with caplog.at_level(logging.WARNING):
        repaired = load_data(config).train.__getitems__([0, 700])["pixel_values"]
    assert sum(encoded) == whole + 300
    assert "is damaged; it is encoded again" in caplog.text
    assert torch.equal(first, repaired)
    index = shard.parent / "index.json"
    index.write_text("{")
    with caplog.at_level(logging.WARNING):
        load_data(config)
    assert "the index of the latent cache" in caplog.text
    # An interrupted run: only its first shard is there.
    index.write_text(json.dumps(dict(list(json.loads(index.read_text()).items())[:1])))
    encoded.clear()
    load_data(config)
    assert sum(encoded) == len(load_data(config).train) - 300


def test_flip_keeps_both_versions(options):
    data = load_data(dblocks.DataConfig(**options, augment=["flip"]))
    assert data.train.shards[0].shape[1] == 2
    assert data.test.shards[0].shape[1] == 1
    with pytest.raises(dblocks.UserError, match="only be augmented by flip, got shift"):
        load_data(dblocks.DataConfig(**options, augment=["shift"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 7}, "must be divisible by 2"),
        ({"channels": 3}, "reads 1 channels"),
        ({"vae": "/nowhere/vae"}, "cannot load the autoencoder '/nowhere/vae'"),
        ({"latent_scale": 100.0}, "set data.latent_scale to"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(options, changes, words):
    with pytest.raises(dblocks.UserError, match=words):
        load_data(dblocks.DataConfig(**{**options, **changes}))


def test_sets_too_large_for_memory_are_decoded_when_read(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(20):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / name / f"{i:02d}.png")
    config = dblocks.DataConfig(source="folder", path=str(tmp_path), image_size=8, test_share=0.2)
    whole = dblocks.load_images(config)
    monkeypatch.setattr(sources, "MEMORY_LIMIT", 100)
    lazy = dblocks.load_images(config)
    assert isinstance(lazy.train.images, sources.LazyImages)
    for part, other in zip(whole[:3], lazy[:3], strict=True):
        rows = list(range(len(part)))
        assert torch.equal(part.pixels(rows), other.pixels(rows))
        assert torch.equal(part.labels, other.labels)
    assert lazy.train.identity() != lazy.test.identity()
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(dblocks.UserError, match=r"cannot read image .*png"):
        dblocks.load_images(config).train.pixels(list(range(len(lazy.train))))


# ---------------------------------------------------------------- features


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(features, "STEPS", 25)


def test_the_feature_network_is_trained_once_and_tells_sets_apart(quick, tmp_path, monkeypatch):
    data = make_data(400)
    config = dblocks.DataConfig(cache_dir=str(tmp_path))
    network = features.small_network(data, config, 4)
    monkeypatch.setattr(features, "_fit", lambda *_: pytest.fail("trained again"))
    again = features.small_network(data, config, 4)
    pixels = data.pixels(list(range(400)))
    assert torch.equal(network(pixels), again(pixels))
    assert features.right(network, pixels, data.labels).float().mean() > 0.9
    own, inverted = features.extract(network, pixels), features.extract(network, 255 - pixels)
    same = features.distances(network.names, own[:200], own[200:])
    other = features.distances(network.names, inverted[:200], own[200:])
    assert set(same) == {"feature_distance", "kernel_distance"}
    assert same["feature_distance"].value < 0.1 * other["feature_distance"].value
    assert same["kernel_distance"].value < 0.1 * other["kernel_distance"].value
    with pytest.raises(dblocks.UserError, match="needs at least 65 samples, got 64"):
        features.distances(network.names, own[:64], own)
    with pytest.raises(dblocks.UserError, match=r"65 reference images, got 64; set evaluation\.num_samples to 0"):
        features.distances(network.names, own, own[:64])


def test_a_damaged_feature_network_is_trained_again(quick, tmp_path, caplog):
    config = dblocks.DataConfig(cache_dir=str(tmp_path))
    network = features.small_network(make_data(100), config, 4)
    (path,) = tmp_path.glob("features-*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        again = features.small_network(make_data(100), config, 4)
    assert "is damaged; it is trained again" in caplog.text
    pixels = make_data(100).pixels([0, 1])
    torch.testing.assert_close(network(pixels), again(pixels))


def test_inception_from_a_file_gives_fid_by_its_name(tmp_path):
    class Scripted(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return images.float().mean(2)[:, :, :4].flatten(1) / 255

    path = str(tmp_path / "inception.pt")
    torch.jit.script(Scripted()).save(path)
    network = features.Inception(path)
    assert network.num_features == 12
    pixels = torch.randint(0, 255, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    own = features.extract(network, pixels)
    found = features.distances(network.names, own[:30], own[30:])
    assert set(found) == {"fid", "kid"}
    (tmp_path / "broken.pt").write_bytes(b"no")
    with pytest.raises(dblocks.UserError, match="cannot load"):
        features.Inception(str(tmp_path / "broken.pt"))


def test_frechet_distance_of_gaussians_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 2, generator=generator) * torch.tensor([10.0, 4.0]) + 100
    b = torch.randn(20_000, 2, generator=generator) * torch.tensor([5.0, 4.0]) + torch.tensor([103.0, 96.0])
    found = features.distances(("feature_distance", "kernel_distance"), a, b)["feature_distance"].value
    assert found == pytest.approx(3**2 + 4**2 + (10 - 5) ** 2, rel=0.06)


# ---------------------------------------------------------------- files


def test_grids_are_in_reading_order_with_gaps():
    pixels = torch.stack([torch.full((1, 2, 2), value, dtype=torch.uint8) for value in (10, 20, 30)])
    picture = grid(pixels, columns=2)
    assert picture.shape == (5, 5)
    assert (picture[0, 0], picture[0, 3], picture[3, 0]) == (10, 20, 30)
    assert picture[0, 2] == picture[4, 4] == 255


def test_pixels_are_rounded_and_clipped():
    found = to_pixels(torch.tensor([-2.0, -1.0, 0.001, 1.0, 3.0]))
    assert found.tolist() == [0, 0, 128, 255, 255]


def test_what_cannot_be_sampled_is_refused():
    task = dblocks.ImageGeneration()
    trained = SimpleNamespace(data=SimpleNamespace(classes=["a", "b"]))
    with pytest.raises(dblocks.UserError, match="guidance needs a null class"):
        dblocks.ImageGeneration(label_dropout=0.0, guidance=2.0)
    with pytest.raises(dblocks.UserError, match="class 2 does not exist: classes are 0 to 1"):
        task.make(trained, Asked(num=4, classes="2"))
    with pytest.raises(dblocks.UserError, match=r"must end in \.png"):
        check_file(task.sampling(None), Path("x.jpg"))
