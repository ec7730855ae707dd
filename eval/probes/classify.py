"""Probes: which features are chosen, and logistic regression on these, as the package sae-probes 0.4.2 has both.

Kantamneni et al., arXiv:2502.16681. Probes on k features have an L1 penalty (saga), those on all of them L2 (L-BFGS), as strong
as is best for the AUC on a part of the training texts.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.eval.probes.texts import SEED, Indices
from residual_saes.shared.errors import UserError

try:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits
except ImportError:
    raise UserError("probes need the scikit-learn package: pip install scikit-learn") from None

_STEPS = 1000  # passes of a solver at most; that it is cut there is part of the definition
_STRENGTHS = np.logspace(5, -5, 10)  # C, the inverse of the penalty
_VALIDATION, _FOLDS = 100, 6  # texts; of fewer than 128 training texts folds


@contextlib.contextmanager
def fitting_quietly() -> Iterator[None]:
    """A thread a probe, and no word of solvers that were cut."""
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def by_difference(z: Tensor, labels: Tensor) -> Tensor:
    """Features of z [n, F] by |difference of the means of both labels|, each in units of its mean where it is active."""
    mean = z.abs().sum(0) / ((z != 0).sum(0) + 1e-6)
    z = z / (mean + 1e-6)
    return torch.argsort((z[labels == 1].mean(0) - z[labels == 0].mean(0)).abs(), descending=True)


def auc(train: Tensor, labels: Indices, test: Tensor, test_labels: Indices, *, sparse: bool) -> float:
    """AUC on the test texts of a probe on train [n, k], whose penalty is L1 if `sparse`, else L2."""
    x, z, y = train.double().numpy(), test.double().numpy(), labels
    folds = _folds(y)
    means = [np.mean([_score(c, x[a], y[a], x[b], y[b], sparse) for a, b in folds]) for c in _STRENGTHS]
    best = _STRENGTHS[int(np.argmax(means))]
    order = np.random.RandomState(SEED).permutation(len(x))
    return _score(best, x[order], y[order], z, test_labels, sparse)


def _folds(labels: Indices) -> list[tuple[Any, Any]]:
    """(texts to fit, texts to score) for choosing the penalty."""
    n = len(labels)
    if n >= 128:
        last = n - min(n // 5, _VALIDATION)
        return [(slice(0, last), slice(last, n))]
    return list(StratifiedKFold(_FOLDS, shuffle=True, random_state=SEED).split(labels, labels))


def _score(strength: float, x: NDArray[np.float64], y: Indices, z: NDArray[np.float64], labels: Indices, sparse: bool) -> float:
    """AUC on z of what was fitted to x."""
    penalty = {"solver": "saga", "l1_ratio": 1.0} if sparse else {}
    model = LogisticRegression(C=strength, random_state=SEED, max_iter=_STEPS, **penalty).fit(x, y)
    return float(roc_auc_score(labels, model.predict_proba(z)[:, 1]))
