"""Recipes by name: values of `python -m train`'s options that are not given. What each of them gains: docs/train.md."""

PUBLISHED = "published"

RECIPES: dict[str, dict[str, float | str]] = {
    PUBLISHED: {"decoder_norm": "unit", "lr_decay": 0.0, "refit": 0.0, "l1_warmup": 0},
    "best": {"decoder_norm": "free", "lr_decay": 0.0, "refit": 0.1, "l1_warmup": 0},
}
