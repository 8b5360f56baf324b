"""Methods that train a whole network, optimizers, weights in bf16, and language models."""

import dataclasses
import sys
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTForImageClassification

import diffusionblocks as dblocks
from diffusionblocks.errors import UserError
from diffusionblocks.experiments.run import load_run, prepare
from diffusionblocks.experiments.train import train
from diffusionblocks.methods import for_method
from diffusionblocks.networks import readout
from diffusionblocks.networks.readout import chunked_cross_entropy
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.recipes import load_recipe
from tests.conftest import TOKENS, config, make_data, make_gpt2, make_neox, make_vit, same, weights


def trained(**options):
    made = dblocks.Trainer(
        dblocks.convert(make_vit(hidden_size=80), 3),
        dblocks.Classification(),
        make_data(),
        None,
        config(**options),
        output_dir=options.pop("output_dir", None),
    )
    made.fit()
    return made


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw-8bit"])
def test_every_optimizer_trains_moves_and_resumes(optimizer, tmp_path):
    if optimizer == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    whole = trained(optimizer=optimizer, residency="disk")
    assert same(weights(whole.model), weights(trained(optimizer=optimizer).model))

    def made(folder):
        torch.manual_seed(0)
        blocks = dblocks.convert(make_vit(hidden_size=80), 3)
        settings = config(optimizer=optimizer, residency="disk", checkpoint_every=3)
        return dblocks.Trainer(blocks, dblocks.Classification(), make_data(), None, settings, output_dir=folder)

    first = made(tmp_path)
    steps = iter(range(100))
    original = first.visit

    def stopping(*arguments):
        if next(steps) == 7:
            raise RuntimeError("killed")
        return original(*arguments)

    first.visit = stopping
    with pytest.raises(RuntimeError, match="killed"):
        first.fit()
    second = made(tmp_path)
    second.fit()
    assert same(weights(second.model), weights(whole.model))


def test_weights_in_bf16_train_and_take_half_the_memory():
    made = trained(precision="bf16-true", residency="disk")
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    halves = sum(t.nbytes for t in made.states[0].tensors().values())
    wholes = sum(t.nbytes for t in trained().states[0].tensors().values())
    assert halves == pytest.approx(wholes / 2, rel=0.01)
    assert torch.isfinite(torch.tensor(made.evaluate(make_data())["validation_loss"].value))


@pytest.fixture
def pretrained(tmp_path):
    make_vit(num_hidden_layers=4, image_size=8, num_labels=10).save_pretrained(tmp_path / "vit")
    sizes = [("model.pretrained", str(tmp_path / "vit")), ("data.channels", 1), ("num_blocks", 2)]
    settings = [("steps", 2), ("batch_size", 8), ("train.branch_at", 0.0), ("device", "cpu")]
    return load_recipe("digits", [*sizes, *settings])


def changed(recipe, method):
    run = prepare(for_method(dataclasses.replace(recipe, method=method), method))
    before = weights(run.model)
    run.trainer.fit()
    after = weights(run.model)
    return run, {name for name in before if not torch.equal(before[name], after[name])}


def test_last_block_trains_the_last_layers_and_the_readout_alone(pretrained):
    run, moved = changed(pretrained, "last-block")
    layers = {name.split(".layers.")[1][0] for name in moved if ".layers." in name}
    assert layers == {"2", "3"}
    assert all(".layers." in name or "readout" in name for name in moved)
    assert run.model.layer_evaluations(0) == pytest.approx(4 / 3 + 2 * 2 / 3)


def test_lora_moves_only_its_matrices_and_saves_a_peft_adapter(pretrained, tmp_path):
    peft = pytest.importorskip("peft")
    pretrained.lora.rank = 2
    summary = train(dataclasses.replace(pretrained, method="lora"), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert {name for name, p in run.model.named_parameters() if p.requires_grad and "lora" not in name} == {
        name for name, _ in run.model.named_parameters() if "readout" in name and "modules_to_save" in name
    }
    base = ViTForImageClassification.from_pretrained(pretrained.model.pretrained)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model").eval()
    run.model.eval()
    batch = run.data.test.__getitems__([0, 1, 2])
    torch.testing.assert_close(loaded(pixel_values=batch["pixel_values"]).logits, run.model(batch))
    assert summary["peak_memory"]["optimizer"] < 0.7 * summary["peak_memory"]["parameters"]


def test_full_needs_a_pretrained_network_and_says_so():
    recipe = load_recipe("digits", [("method", "full")])
    with pytest.raises(UserError, match=r"set model\.pretrained"):
        prepare(recipe)


def make_llama(**changes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=97)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, "tie_word_embeddings": False, **changes}))


@pytest.mark.parametrize("tied", [False, True])
def test_language_models_have_transformers_own_loss_and_gradients(tied):
    network = make_llama(tie_word_embeddings=tied)
    tokens = {"input_ids": torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))}
    wanted = network(**tokens, labels=tokens["input_ids"]).loss
    wanted.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    task = dblocks.CausalLM()
    whole = dblocks.EndToEndModel(take_apart(network))
    loss = task.step(whole, 0, tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for name, p in whole._network[0].named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
    parts = take_apart(network)
    model = dblocks.BlockCoordinateModel(parts, [range(0, 2), range(2, 4)])
    for active in range(2):
        task.step(model, active, tokens).loss.backward()
    for name, p in parts.network.named_parameters():
        assert (p.grad is None) == (tied and ".layers." not in name)  # shared with the readout: frozen
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("never", [None, 3])
def test_chunked_cross_entropy_equals_the_plain_one(monkeypatch, never):
    monkeypatch.setattr(readout, "CHUNK_ELEMENTS", 1)
    hidden = torch.randn(37, 8, requires_grad=True)
    head, labels = torch.nn.Linear(8, 11), torch.randint(0, 11, (37,))
    labels[labels == 3] = 4
    labels[5] = readout.IGNORED
    found = chunked_cross_entropy(hidden, head, labels, never)
    logits = head(hidden)
    possible = [token for token in range(11) if token != never]
    wanted = -logits.gather(1, labels.clamp(min=0)[:, None])[:, 0] + logits[:, possible].logsumexp(1)
    wanted = wanted * (labels != readout.IGNORED)
    torch.testing.assert_close(found, wanted)
    ours, theirs = (torch.autograd.grad(losses.sum(), [hidden, head.weight]) for losses in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_the_task_of_language_models_refuses_other_networks():
    with pytest.raises(UserError, match="trains language models"):
        dblocks.CausalLM().step(dblocks.EndToEndModel(take_apart(make_vit())), 0, {"input_ids": torch.zeros(1, 2)})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "mistral", "qwen2"])
def test_the_whole_network_is_the_original_sliding_windows_included(kind, attention):
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {**TOKENS, "num_key_value_heads": 1, "sliding_window": 4, "pad_token_id": None}
    torch.manual_seed(0)
    network = {
        "llama": make_llama,
        "gpt2": make_gpt2,
        "neox": make_neox,
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=True, max_window_layers=3)),
    }[kind]().eval()
    network.set_attn_implementation(attention)
    model = dblocks.EndToEndModel(take_apart(network)).eval()
    tokens = torch.randint(0, 12, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model({"input_ids": tokens}), network(tokens).logits, rtol=1e-4, atol=1e-5)
    for place in range(11):  # the loss of a leak would be beautiful, the text garbage
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 12
        change = (model({"input_ids": other}) - model({"input_ids": tokens})).abs().amax((0, 2))
        assert (change[:place] == 0).all() and change[place] > 0


def test_a_gpu_without_bf16_is_refused_and_a_processor_that_imitates_it_says_so(monkeypatch, caplog):
    from diffusionblocks.system.devices import check_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="this GPU has no bf16"):
        check_precision("bf16", torch.device("cuda"))
    check_precision("fp32", torch.device("cuda"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with caplog.at_level("WARNING", "diffusionblocks"):
        trained(precision="bf16", steps=1)
    assert "imitates bf16" in caplog.text


class StandIn(torch.optim.Optimizer):
    """Keeps what bitsandbytes' AdamW8bit keeps: a state is new where there is none, and then has its number of
    steps."""

    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr})
        self.name2qmap = {"dynamic": torch.zeros(256), "udynamic": torch.zeros(256)}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, large = self.state[p], p.numel() >= 4096
                if not state:
                    state["step"] = 0
                    for number, name in ((1, "dynamic"), (2, "udynamic")):
                        state[f"state{number}"] = torch.zeros_like(p, dtype=torch.uint8 if large else torch.float32)
                        if large:
                            state[f"absmax{number}"] = torch.zeros(-(-p.numel() // 256), device=p.device)
                            state[f"qmap{number}"] = self.name2qmap[name]
                state["step"] += 1
                p.add_(p.grad, alpha=-float(group["lr"]))


def test_idle_blocks_keep_the_state_of_an_8bit_optimizer(monkeypatch):
    stand_in = types.SimpleNamespace(AdamW8bit=StandIn)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.SimpleNamespace(optim=stand_in))
    found = []
    for residency in ("device", "disk"):
        model = dblocks.convert(make_vit(hidden_size=64, intermediate_size=128), 3)
        options = config(optimizer="adamw-8bit", residency=residency, steps=3)
        trainer = dblocks.Trainer(model, dblocks.Classification(), make_data(), None, options)
        trainer.fit()
        found.append(weights(model))
        assert {state["step"] for state in trainer.states[1].optimizer.state.values()} == {3}
    assert same(*found)
