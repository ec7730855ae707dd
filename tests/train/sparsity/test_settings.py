import dataclasses
import json

import numpy as np
import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.run import run_config
from residual_saes.shared.runs.sparsity import prefix_ends
from residual_saes.train.config import PUBLISHED, RECIPES, TrainConfig, parse_plans
from residual_saes.train.sparsity.base import ControllerConfig, Sparsity
from residual_saes.train.sparsity.batchtopk import BatchTopK, LargestOfBatch
from residual_saes.train.sparsity.jumprelu import JumpRelu
from residual_saes.train.sparsity.l1 import L1Setting
from residual_saes.train.sparsity.matryoshka import Matryoshka
from residual_saes.train.sparsity.settings import KINDS, parse_setting
from residual_saes.train.sparsity.topk import TopK
from residual_saes.train.step import StepConfig

ALL = "3e-4,0.00008,adaptive,adaptive:1e-3@64,batchtopk:64,topk:64,jumprelu:64,matryoshka:64,matryoshka:8@0.25+0.5"


def test_settings_as_people_write_them() -> None:
    assert tuple(map(parse_setting, ALL.split(","))) == (
        L1Setting(init=3e-4),
        L1Setting(init=8e-5),
        L1Setting(init=5e-4, target=150),
        L1Setting(init=1e-3, target=64),
        BatchTopK(k=64),
        TopK(k=64),
        JumpRelu(l0=64),
        Matryoshka(k=64),
        Matryoshka(k=8, prefixes=(0.25, 0.5)),
    )
    names = " ".join(setting.name for setting in map(parse_setting, ALL.split(",")))
    assert names == (
        "l1-3e-4-fixed l1-8e-5-fixed l1-adaptive l1-adaptive-1e-3-l0-64 batchtopk-64 topk-64 jumprelu-64 matryoshka-64 "
        "matryoshka-8-of-0.25-0.5"
    )
    assert parse_setting("matryoshka:8@256+1024").name == "matryoshka-8-of-256-1024"


def test_prefixes_end_with_the_dictionary_and_none_is_empty() -> None:
    assert prefix_ends((1 / 32, 0.25, 0.5), 128) == (4, 32, 64, 128)
    assert prefix_ends((1 / 32, 0.25), 8) == (2, 8)
    assert prefix_ends((16, 40), 64) == (16, 40, 64)


NONE = "-1 0 adaptive:x adaptive:1e-3 1e-3@5 3e-4, nan inf 1.2.3 batchtopk batchtopk:0 batchtopk:1.5 batchtopk:-3 batchtopk:8@2"
HUGE = "1e30 adaptive:5e-4@1e30 adaptive:1e30@5 1e999"


NESTED = "matryoshka matryoshka:0 matryoshka:8@ matryoshka:8@64+64 matryoshka:8@64+32 matryoshka:8@0.5+64 matryoshka:8@0.0"


@pytest.mark.parametrize("text", ["", *NONE.split(), *HUGE.split(), "topk", "topk:0", "jumprelu:1.5", *NESTED.split()])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(
        UserError, match=r"is not a setting: write a positive λ such as 3e-4, .*, topk:64, jumprelu:64, matryoshka:64, "
    ):
        parse_setting(text)


def test_each_setting_has_its_recipe() -> None:
    plans = parse_plans("3e-4, 3e-4/best,batchtopk:8/decay", PUBLISHED, lambda recipe, kind: TrainConfig(tokens=len(recipe)))
    assert [(p.sparsity, p.recipe, p.config.tokens) for p in plans] == [
        (L1Setting(init=3e-4), "published", 9),
        (L1Setting(init=3e-4), "best", 4),
        (BatchTopK(k=8), "decay", 5),
    ]
    for text, said in (("3e-4,0.0003", "twice"), ("3e-4/best,3e-4/best", "twice"), ("3e-4/worst", "published, decay, best")):
        with pytest.raises(UserError, match=said):
            parse_plans(text, PUBLISHED, lambda recipe, kind: TrainConfig(tokens=1))


@pytest.mark.parametrize("setting", [*map(parse_setting, ALL.split(","))], ids=lambda s: s.name)
def test_a_kind_is_told_by_its_name_or_was_there_before_names(setting: Sparsity) -> None:
    fields = setting.fields()
    assert fields.pop("kind", None) == setting.KIND
    assert type(setting)(**json.loads(json.dumps(fields))) == setting
    assert (setting.reading is None) is (setting.KIND is None) is (type(setting) in (L1Setting, BatchTopK))
    names = [kind.KIND for kind in KINDS if kind.KIND is not None]
    assert len(set(names)) == len(names) == len(KINDS) - 2


def test_the_threshold_is_the_mean_of_the_last_least_activations_and_goes_on_from_its_state() -> None:
    whole, half = (BatchTopK(k=8).control(1000, ControllerConfig()) for _ in range(2))
    least = 3 + 0.1 * np.random.default_rng(0).standard_normal(1000)
    least[:500] += 5
    for step in range(1000):
        whole.update(step, 8.0, least[step])
        if step == 600:
            half.state = type(half.state)(**json.loads(json.dumps(dataclasses.asdict(half.state))))
        half.update(step, 8.0, least[step])
    assert half.state == whole.state
    assert whole.threshold == pytest.approx(3, rel=0.02)
    assert (whole.value, whole.l1_at(0), whole.hidden_at(0), whole.hidden_at(999)) == (0, 0, *[LargestOfBatch(8)] * 2)


@pytest.mark.parametrize("text", ALL.split(","))
def test_the_best_recipe_is_the_kinds_own(text: str) -> None:
    """Rows of any norm and a last part without L1 are for L1; other kinds have a rate that falls, and wake features."""
    best = RECIPES["best"](parse_setting(text))
    by_l1 = isinstance(parse_setting(text), L1Setting)
    assert (best.decoder_norm == "free", best.hold_l0 > 0, best.lr_decay == 0, not best.revive) == (by_l1,) * 4


DIGESTS = {
    ("3e-4", "published"): "9c700db41e0c98b9be930123ed50e7020397306cee6946473d8b9782c4230809",
    ("3e-4", "best"): "a985318f99f3574896bf4f742a13e3554bcfd91723d2c16f656fa55a60753dd8",
    ("adaptive:1e-3@64", "published"): "2efdcc0867cc031d70567567ffd7710650839375dc84dc672fce506a3c5d5d78",
    ("adaptive:1e-3@64", "best"): "272ac3ef815e7946042711404df95d393837bddfd9cd3eb5769b39de580a2b48",
    ("batchtopk:64", "published"): "b7569313711f8abae8199a35a036d833b3ff908c53a35004e6b715ce098b72dc",
    ("batchtopk:64", "best"): "c136107373acf4b7b5898f8ede00fa03facd2d906079c123c8f4a3963633be89",
}


@pytest.mark.parametrize(("text", "recipe"), DIGESTS)
def test_digests_are_those_of_runs_that_exist(text: str, recipe: str) -> None:
    """Of runs from before there were names of kinds, and while there were other refits."""
    setting, best = parse_setting(text), L1Setting.BEST  # which was that of every kind
    chosen = dataclasses.asdict(best if recipe == "best" else RECIPES[recipe](setting))
    step = StepConfig(decoder_norm=chosen.pop("decoder_norm"))
    fields = TrainConfig(tokens=300_000_000, step=step, **chosen).fields()
    run = run_config(fields | {"l1": setting.fields()}, {"digest": "abc", "spec": {}})
    assert run["digest"] == DIGESTS[text, recipe]
