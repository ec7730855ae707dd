"""The kinds of sparsity that `--l1` names, any number of them side by side on one stream."""

from residual_saes.shared.errors import UserError
from residual_saes.train.sparsity.base import Sparsity
from residual_saes.train.sparsity.batchtopk import BatchTopK
from residual_saes.train.sparsity.jumprelu import JumpRelu
from residual_saes.train.sparsity.l1 import L1Setting
from residual_saes.train.sparsity.matryoshka import Matryoshka
from residual_saes.train.sparsity.topk import TopK

KINDS: tuple[type[Sparsity], ...] = (
    L1Setting,
    BatchTopK,
    TopK,
    JumpRelu,
    Matryoshka,
)
FORMS = ", ".join(kind.FORMS for kind in KINDS)


def parse_setting(text: str) -> Sparsity:
    """Read one setting, such as adaptive:1e-3@64. Raises UserError."""
    for kind in KINDS:
        if (setting := kind.parse(text)) is not None:
            return setting
    raise UserError(f"{text!r} is not a setting: write {FORMS}")
