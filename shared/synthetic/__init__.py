"""Synthetic worlds: activations made of features that are known, so that the truth can be held against what an SAE has found.

The law is SynthSAEBench's (Chanin & Garriga-Alonso, arXiv:2602.14687): Zipf's firing probabilities, a forest of features in
which a child fires only with its parent and siblings exclude each other, a Gaussian copula of low rank between features, and
magnitudes that are normal but never negative. Everything is a pure function of the configuration, a seed and a number.
"""

from residual_saes.shared.synthetic.config import WorldConfig

__all__ = ["WorldConfig"]
