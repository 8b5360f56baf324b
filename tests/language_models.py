"""A small pretrained language model with a tokenizer of its own, as a folder and as a .gguf file."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
    "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(template=TEMPLATE):
    """Bytes and a few merges, SmolLM's special tokens."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        ["what is the answer to this question"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    wrapped.chat_template = template
    return wrapped


def make_pretrained(folder, *, tied=True, layers=4, template=TEMPLATE, seed=0):
    """Writes network and tokenizer as `save_pretrained` does, and returns the network."""
    tokenizer = make_tokenizer(template)
    torch.manual_seed(seed)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
    ).eval()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return network


def write_messages(path, count=30):
    """Short sums, asked and answered."""
    rows = []
    for number in range(count):
        question, answer = f"What is {number} plus {number}?", f"It is {2 * number}."
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(folder, count=20):
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text(f"Text {number}: the answer to question {number} is {number}. " * 20)
    return folder
