"""The kinds of sparsity that `--l1` names, any number of them side by side on one stream."""

from residual_saes.shared.errors import UserError
from residual_saes.train.sparsity.base import Sparsity
from residual_saes.train.sparsity.batchtopk import BatchTopK
from residual_saes.train.sparsity.l1 import L1Setting
from residual_saes.train.sparsity.topk import TopK

KINDS: tuple[type[Sparsity], ...] = (
    L1Setting,
    BatchTopK,
    TopK,
)
FORMS = ", ".join(kind.FORMS for kind in KINDS)


def parse_settings(text: str) -> tuple[Sparsity, ...]:
    """'3e-4,adaptive:1e-3@64,batchtopk:64' → settings. Raises UserError."""
    settings = tuple(_parse(part.strip()) for part in text.split(","))
    if len(set(settings)) < len(settings):
        raise UserError(f"{text!r} names a setting twice; name each once")
    return settings


def _parse(text: str) -> Sparsity:
    for kind in KINDS:
        if (setting := kind.parse(text)) is not None:
            return setting
    raise UserError(f"{text!r} is not a setting: write {FORMS}")
