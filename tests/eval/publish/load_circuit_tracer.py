"""Run by the Python of circuit-tracer's environment: a set opened by its loader, what it computes, and an attribution graph.

python load_circuit_tracer.py MODEL SET IN OUT      SET is a folder in $CIRCUIT_TRACER_CACHE_DIR

The model is put together by TransformerLens' own parts, since its `from_pretrained` takes no folder, only names of the hub.
"""

import sys

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from transformer_lens import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config, get_pretrained_state_dict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def replacement_model(folder, transcoders):
    config = convert_hf_model_config(folder) | {"model_name": "tiny", "init_weights": False, "device": "cpu"}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = TransformerLensReplacementModel(HookedTransformerConfig.from_dict(config), tokenizer=tokenizer)
    weights = get_pretrained_state_dict(folder, model.cfg, AutoModelForCausalLM.from_pretrained(folder))
    plain = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(weights, **plain)
    model._configure_replacement_model(transcoders)
    return model


if __name__ == "__main__":
    lm, name, given, out = sys.argv[1:]
    inputs = torch.load(given)
    transcoders, config = load_transcoder_from_hub(name)
    with torch.no_grad():
        z = transcoders.encode(inputs["x"])
        y = transcoders.decode(z, inputs["x"])
    model = replacement_model(lm, transcoders)
    _, activations = model.get_activations(inputs["tokens"])
    graph = attribute(inputs["tokens"], model, max_n_logits=3, batch_size=64)
    found = {
        "z": z, "y": y, "said": [config["feature_input_hook"], config["feature_output_hook"], graph.scan],
        "tokens": graph.input_tokens, "activations": activations, "features": graph.active_features,
        "values": graph.activation_values, "edges": graph.adjacency_matrix, "n_logits": len(graph.logit_targets),
    }  # fmt: skip
    torch.save({key: v.detach().clone() if isinstance(v, torch.Tensor) else v for key, v in found.items()}, out)
