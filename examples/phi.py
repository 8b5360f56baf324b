"""A network family of one's own: Phi of Hugging Face transformers, declared outside of the package.

    python examples/phi.py           converts a small Phi into three blocks and prints them

A package that wants `dblocks` to know its family names the declaration in its pyproject.toml instead:

    [project.entry-points."diffusionblocks.networks"]
    phi = "examples.phi:PHI"
"""

import diffusionblocks as dblocks
from diffusionblocks.networks.adapter import Adapter
from diffusionblocks.networks.llama import TokenStem, rotary_layers, token_readout

PHI = Adapter(
    model_classes=("PhiForCausalLM",),
    stem=("model.embed_tokens",),
    layers="model.layers",
    layer_norms=("layer.input_layernorm",),
    readout=("model.final_layernorm", "lm_head"),
    make_stem=TokenStem,
    make_readout=token_readout,
    make_layer=rotary_layers("model.rotary_emb"),
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    targets=("causal", "masked", "recurrent"),
)

if __name__ == "__main__":
    from transformers import PhiConfig, PhiForCausalLM

    dblocks.register_network(PHI)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    network = PhiForCausalLM(PhiConfig(num_hidden_layers=6, **sizes))
    print(dblocks.convert(network, num_blocks=3, target="causal").summary())
