from pathlib import Path
from typing import cast

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoConfig, GPT2Config, LlamaConfig, PretrainedConfig

from residual_saes.eval.floors.students import (
    _LOGITS,
    DistillConfig,
    Student,
    Target,
    Teacher,
    Texts,
    make_student,
    student_config,
)
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import load_model

CPU = torch.device("cpu")


def logits(seed: int) -> torch.Tensor:
    return 4 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.fixture
def teacher(lm: Path) -> Teacher:
    return Teacher(load_model(str(lm), None, "fp32", head=True), CPU, "fp32", 2.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_and_its_gradient_are_those_of_float64(temperature: float) -> None:
    ours, theirs = logits(1), logits(0)
    leaf = ours.double().requires_grad_()
    p, log_q = (theirs.double() / temperature).softmax(-1), log_softmax(leaf / temperature, -1)
    direct = (p * (p.log() - log_q)).sum()
    (direct / 15).backward()
    direct, log_q = direct.detach(), log_q.detach()
    kl, grad = Target(theirs, temperature).kl_and_grad(ours, 15)
    assert float(kl) == pytest.approx(float(direct), rel=1e-6)
    assert float(kl) == pytest.approx(float(kl_div(log_q, p, reduction="sum")), rel=1e-6)
    assert float(kl) / 15 == pytest.approx(float(kl_div(log_q, p, reduction="batchmean")) / 5, rel=1e-6)  # a sum over 5 tokens
    torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-5, atol=1e-8)


def test_a_student_that_is_the_teacher_has_no_floor(teacher: Teacher, cache: Cache) -> None:
    tokens = torch.from_numpy(cache.read_tokens(0, 3))
    ce, (found,) = teacher.measure([teacher._model], tokens)
    assert (found.floor, found.kl, found.ce) == (0.0, 0.0, ce)
    kl, grad = Target(logits(2), 2.0).kl_and_grad(logits(2), 15)
    assert float(kl) == 0 and not grad.any()


def test_what_is_measured_is_a_mean_over_tokens_whatever_the_parts(
    teacher: Teacher, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, student = torch.from_numpy(cache.read_tokens(5, 12)), make_student(teacher.config, 16, 0)
    with torch.no_grad():
        a, b = (model(input_ids=tokens).logits.double() for model in (teacher._model, student))
    floor, kl = (
        float((log_softmax(a / t, -1).exp() * (log_softmax(a / t, -1) - log_softmax(b / t, -1))).sum(-1).mean()) for t in (2, 1)
    )
    nats = -log_softmax(b, -1)[:, :-1].gather(2, tokens[:, 1:, None]).mean()
    for values in (1, 2 * 32 * 400, 1 << 30):
        monkeypatch.setitem(_LOGITS, "cpu", values)
        _, (found,) = teacher.measure([student], tokens)
        assert (found.floor, found.kl, found.ce) == pytest.approx((floor, kl, float(nats)), rel=1e-5)


def test_training_comes_nearer_to_the_teacher(teacher: Teacher, cache: Cache, tmp_path: Path) -> None:
    config, tokens = DistillConfig(tokens=0, lr=1e-2), torch.from_numpy(cache.read_tokens(0, 8))
    student = Student(teacher, 16, 0, config, 30, tmp_path / "state", "")
    losses = [teacher.train_step([student], tokens)[0] for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert losses[0] == pytest.approx(teacher.measure([make_student(teacher.config, 16, 0)], tokens)[1][0].floor)


def test_students_depend_on_width_and_seed_alone(teacher: Teacher) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (make_student(teacher.config, 16, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_heads_are_as_wide_as_the_teachers_as_nearly_as_a_width_allows() -> None:
    demo = AutoConfig.from_pretrained(Path(__file__).parents[3] / "demo" / "neox-2m")
    shapes = {w: student_config(demo, w) for w in (16, 32, 48, 64, 96, 128)}
    assert {w: c.num_attention_heads for w, c in shapes.items()} == {16: 1, 32: 1, 48: 2, 64: 2, 96: 3, 128: 4}
    assert all(c.intermediate_size == 4 * w and c.num_hidden_layers == 6 for w, c in shapes.items())
    assert demo.hidden_size == 128
    pythia = demo.__class__(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=24)
    assert [student_config(pythia, w).num_attention_heads for w in (128, 256, 384, 512, 768)] == [2, 4, 6, 8, 12]


@pytest.mark.parametrize("width", [8, 24, 40])
def test_students_of_both_families_run_at_odd_widths(lm: Path, width: int) -> None:
    gpt2 = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    for config in (gpt2, cast(PretrainedConfig, AutoConfig.from_pretrained(lm))):
        student = make_student(config, width, 0)
        tokens = torch.arange(6)[None]
        assert student(input_ids=tokens).logits.shape == (1, 6, config.vocab_size)
        assert torch.equal(student(input_ids=tokens).logits, student(input_ids=tokens).logits)  # no dropout


def test_what_no_student_can_be_built_of_is_said_in_one_line(lm: Path) -> None:
    with pytest.raises(UserError, match="gpt_neox and gpt2 models alone, this one is a llama"):
        student_config(LlamaConfig(), 64)
    with pytest.raises(UserError, match="no heads whose rotated part is even: choose multiples of 16"):
        student_config(AutoConfig.from_pretrained(lm), 7)


def test_batches_go_over_the_training_tokens_and_nothing_else(cache: Cache) -> None:
    spec, config = cache.spec, DistillConfig(tokens=0, batch=16)
    n = spec.train_blocks * spec.block_sequences
    texts = Texts(cache)
    epochs = torch.cat(list(texts.batches(config, 1, 0, 2 * n // 16))).reshape(2, n, spec.context)
    wanted = torch.from_numpy(cache.read_tokens(0, n))
    for epoch in epochs:
        assert torch.equal(_sorted(epoch), _sorted(wanted))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(next(texts.batches(config, 1, 41, 42)), epochs.reshape(-1, 16, spec.context)[41])
    assert not torch.equal(next(texts.batches(config, 2, 41, 42)), next(texts.batches(config, 1, 41, 42)))


def _sorted(sequences: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(sequences.tolist()))


def test_the_rate_rises_and_then_falls_to_nothing() -> None:
    config = DistillConfig(tokens=0, lr=1.0)
    rates = [config.rate(step, 100) for step in range(101)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], abs=1e-3)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[100] == pytest.approx(0) and rates[53] == pytest.approx(0.5, abs=0.02)
