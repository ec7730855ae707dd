"""Run by the Python of another tool's environment: load an export with that tool, and write what it makes of x.

python load_export.py TOOL FOLDER X OUT        X, OUT: files of torch.save; OUT gets {way of loading: {"z", "xhat", "said"}}
"""

import sys
from importlib import import_module
from pathlib import Path

import torch


def saelens(folder, x):
    sae_class = import_module("sae_lens").SAE
    cache = Path(folder).parent / "hub" / "models--org--repo"  # the hub's client takes what is there for downloaded
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    (snapshot / "layer_1").symlink_to(Path(folder).resolve())
    published, _, sparsity = sae_class.from_pretrained_with_cfg_and_sparsity("org/repo", "layer_1")
    ways = {"load_from_disk": (sae_class.load_from_disk(folder), None), "from_pretrained": (published, sparsity)}
    return {
        way: {
            "z": sae.encode(x),
            "xhat": sae(x),
            "said": {name: sae.cfg.metadata[name] for name in ("hook_name", "model_name", "context_size", "prepend_bos")},
            "sparsity": sparsity,
        }
        for way, (sae, sparsity) in ways.items()
    }


def sparsify(folder, x):
    coder = import_module("sparsify").SparseCoder.load_from_disk(folder)
    out = coder(x)
    z = torch.zeros(len(x), coder.num_latents).scatter(1, out.latent_indices, out.latent_acts)
    return {"load_from_disk": {"z": z, "xhat": out.sae_out}}


def dictionary_learning(folder, x):
    coder, config = import_module("dictionary_learning.utils").load_dictionary(folder, "cpu")
    trainer = config["trainer"]
    trainers, kind = {"BatchTopKSAE": ".trainers.batch_top_k", "AutoEncoderTopK": ".trainers.top_k"}, trainer["dict_class"]
    alone = getattr(import_module(f"dictionary_learning{trainers.get(kind, '')}"), kind).from_pretrained(f"{folder}/ae.pt")
    return {
        way: {"z": sae.encode(x), "xhat": sae(x), "said": trainer}
        for way, sae in {"load_dictionary": coder, "from_pretrained": alone}.items()
    }


if __name__ == "__main__":
    tool, folder, x, out = sys.argv[1:]
    with torch.no_grad():
        torch.save(globals()[tool](folder, torch.load(x)), out)
