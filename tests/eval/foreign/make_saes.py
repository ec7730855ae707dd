"""Run by the Python of another tool's environment: SAEs that the tool draws and saves itself, and what it makes of x.

python make_saes.py TOOL FOLDER        FOLDER/<kind>/ as the tool saves it, with out.pt beside: {"x", "z", "xhat"}
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

D, F, K = 64, 256, 20


def drawn(module):
    """Biases and norms in which a mistake shows."""
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if tensor.ndim == 1:
                tensor.copy_(0.3 * torch.randn_like(tensor) + (0.2 if "threshold" in name else 0))
            elif not tensor.any():  # a skip connection, or a transcoder's decoder
                tensor.copy_(0.1 * torch.randn_like(tensor))
            else:  # [F, d] or [d, F]
                norms = 0.5 + torch.rand(F)
                tensor.mul_(norms[:, None] if len(tensor) == F else norms)


def saelens(folder, x):
    lens = import_module("sae_lens")
    cases = {
        "standard": ("StandardSAE", {}), "apart": ("StandardSAE", {"apply_b_dec_to_input": False}),
        "topk": ("TopKSAE", {"k": K}), "rescaled": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": ("JumpReLUSAE", {}), "gated": ("GatedSAE", {"apply_b_dec_to_input": False}),
    }  # fmt: skip
    for kind in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        cases[kind] = (kind, {"d_out": D, "apply_b_dec_to_input": False})
    for name, (kind, options) in cases.items():
        module = import_module("sae_lens.saes.transcoder") if "Transcoder" in kind else lens
        config = getattr(module, f"{kind}Config")(d_in=D, d_sae=F, **options)
        sae = getattr(module, kind)(config)
        drawn(sae)
        sae.save_model(folder / name)
        loaded = lens.SAE.load_from_disk(folder / name)
        yield name, loaded.encode(x), loaded(x)
    for name, kind, options in (
        ("batchtopk", "BatchTopKTrainingSAE", {"rescale_acts_by_decoder_norm": True}),
        ("matryoshka", "MatryoshkaBatchTopKTrainingSAE", {"matryoshka_widths": [64, F]}),
    ):
        module = import_module(
            "sae_lens.saes.batchtopk_sae" if name == "batchtopk" else "sae_lens.saes.matryoshka_batchtopk_sae"
        )
        sae = getattr(module, kind)(getattr(module, f"{kind}Config")(d_in=D, d_sae=F, k=K, **options))
        drawn(sae)
        sae.topk_threshold.fill_(0.03)
        sae.save_inference_model(folder / name)
        loaded = lens.SAE.load_from_disk(folder / name)
        yield name, loaded.encode(x), loaded(x)


def sparsify(folder, x):
    module = import_module("sparsify")
    for name, options in {
        "topk": {"k": K}, "all": {"k": F, "num_latents": F, "normalize_decoder": False},
        "transcode": {"k": K, "transcode": True}, "skip": {"k": K, "transcode": True, "skip_connection": True},
    }.items():  # fmt: skip
        coder = module.SparseCoder(D, module.SparseCoderConfig(expansion_factor=F // D, **options))
        drawn(coder)
        coder.save_to_disk(folder / name)
        out = module.SparseCoder.load_from_disk(folder / name)(x)
        yield name, torch.zeros(len(x), F).scatter(1, out.latent_indices, out.latent_acts), out.sae_out


def dictionary_learning(folder, x):
    made = dict.fromkeys(("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"), ("dictionary", ()))
    made |= {
        "AutoEncoderTopK": ("trainers.top_k", (K,)), "BatchTopKSAE": ("trainers.batch_top_k", (K,)),
        "MatryoshkaBatchTopKSAE": ("trainers.matryoshka_batch_top_k", (K, [64, 64, 128])),
    }  # fmt: skip
    load = import_module("dictionary_learning.utils").load_dictionary
    for name, (module, more) in made.items():
        coder = getattr(import_module(f"dictionary_learning.{module}"), name)(D, F, *more)
        drawn(coder)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            coder.threshold.fill_(0.7)
        (folder / name).mkdir()
        torch.save(coder.state_dict(), folder / name / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 1, "lm_name": "m"} | (
            {"k": K} if more else {}
        )
        (folder / name / "config.json").write_text(json.dumps({"trainer": trainer}))
        loaded, _ = load(str(folder / name), "cpu")
        yield name, loaded.encode(x), loaded(x)


if __name__ == "__main__":
    tool, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    x = torch.randn(500, D)
    with torch.no_grad():
        for name, z, xhat in globals()[tool](folder, x):
            torch.save({"x": x, "z": z, "xhat": xhat}, folder / name / "out.pt")
