"""Sparse autoencoders on every layer of a language model, from one pass over the text.

The packages lie beside this folder in the repository, and in it once they are installed, so that nothing else than this name
is added to anybody's Python.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("residual-saes")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"
