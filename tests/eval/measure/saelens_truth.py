"""Run by the Python of SAELens' environment: its evaluator on exported SAEs, rows and what fires in them; JSON to stdout."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic.evals import eval_sae_on_synthetic_data


class Given:
    """Stands for its generator and its dictionary of features: what was drawn, once, in order."""

    def __init__(self, x: torch.Tensor, truth: torch.Tensor, directions: torch.Tensor) -> None:
        self._x, self._truth, self._at, self.feature_vectors = x, truth, 0, directions

    def sample(self, n: int) -> torch.Tensor:
        self._at += n
        return self._truth[self._at - n : self._at]

    def __call__(self, acts: torch.Tensor) -> torch.Tensor:
        return self._x[self._at - len(acts) : self._at]


def measured(folder: Path, data: dict[str, torch.Tensor]) -> dict[str, Any]:
    given: Any = Given(**data)
    r = eval_sae_on_synthetic_data(SAE.load_from_disk(folder), given, given, len(data["x"]), batch_size=1000)
    c = r.classification
    return {
        "f1": c.f1_score, "precision": c.precision, "recall": c.recall, "mcc": r.mcc, "uniqueness": r.uniqueness,
        "true_l0": r.true_l0, "l0": r.sae_l0, "explained_variance": r.explained_variance, "dead": r.dead_latents,
    }  # fmt: skip


if __name__ == "__main__":
    rows, out = torch.load(sys.argv[1], weights_only=True), Path(sys.argv[2])
    print(json.dumps({run.name: measured(run / "layer_0", rows) for run in sorted(out.iterdir())}))
