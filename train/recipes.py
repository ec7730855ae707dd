"""Recipes by name: values of `python -m train`'s options that are not given. What each of them gains: docs/train.md."""

PUBLISHED = "published"

RECIPES: dict[str, dict[str, float | str]] = {
    PUBLISHED: {"decoder_norm": "unit", "lr_decay": 0.0, "hold_l0": 0.0},
    "best": {"decoder_norm": "free", "lr_decay": 0.0, "hold_l0": 0.2},
}
