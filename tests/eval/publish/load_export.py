"""Run by the Python of another tool's environment: load exports with that tool, and write what it makes of x.

python load_export.py TOOL FOLDER...       each with x.pt beside it, of torch.save; out.pt there gets {way of loading: {"z",
"xhat", "said"}}
"""

import os
import sys
from importlib import import_module
from pathlib import Path

import torch


def saelens(folder, x):
    sae_class = import_module("sae_lens").SAE
    name = folder.parent.name
    cache = Path(os.environ["HF_HUB_CACHE"]) / f"models--org--{name}"  # the hub's client takes what is there for downloaded
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    (snapshot / "layer_1").symlink_to(folder.resolve())
    published, _, sparsity = sae_class.from_pretrained_with_cfg_and_sparsity(f"org/{name}", "layer_1")
    ways = {"load_from_disk": (sae_class.load_from_disk(str(folder)), None), "from_pretrained": (published, sparsity)}
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
    coder = import_module("sparsify").SparseCoder.load_from_disk(str(folder))
    out = coder(x)
    z = torch.zeros(len(x), coder.num_latents).scatter(1, out.latent_indices, out.latent_acts)
    return {"load_from_disk": {"z": z, "xhat": out.sae_out}}


def dictionary_learning(folder, x):
    coder, config = import_module("dictionary_learning.utils").load_dictionary(str(folder), "cpu")
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    trainers = {"BatchTopKSAE": "batch_top_k", "AutoEncoderTopK": "top_k", "MatryoshkaBatchTopKSAE": "matryoshka_batch_top_k"}
    place = f"trainers.{trainers[kind]}" if kind in trainers else "dictionary"
    alone = getattr(import_module(f"dictionary_learning.{place}"), kind).from_pretrained(f"{folder}/ae.pt")
    return {
        way: {"z": sae.encode(x), "xhat": sae(x), "said": trainer}
        for way, sae in {"load_dictionary": coder, "from_pretrained": alone}.items()
    }


if __name__ == "__main__":
    tool, *folders = sys.argv[1:]
    for folder in map(Path, folders):
        with torch.no_grad():
            torch.save(globals()[tool](folder, torch.load(folder.parent / "x.pt")), folder.parent / "out.pt")
