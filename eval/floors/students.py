"""Students: the model's architecture at another width, trained from scratch to give the model's next-token distribution.

    loss = mean over tokens of KL(p ‖ q),  p = softmax(teacher's logits / T),  q = softmax(student's logits / T)

A mean over tokens, in nats: `kl_div(reduction="batchmean")` of [sequences, context, vocabulary] would be a sum over a
sequence's tokens, a thousand times as much. Some multiply by T²; AdamW does not care, and here it is left out. The gradient
with respect to the student's logits is (q − p) / T, so it is written down instead of differentiated.

AdamW, gradients clipped to norm 1, the rate rising over the first twentieth of the steps and then half a cosine down to 0.
Student, batches and order depend on (width, seed, setting, cache) alone. All widths of a seed take the same batches, so the
teacher runs once for all of them; each is bit for bit what it would be alone, and on a CPU a run that was interrupted ends
with the same bits. The teacher runs in the precision of the harvest, students in float32 (on a GPU with bfloat16 products if
the harvest's were).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import Number, option
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir
from residual_saes.shared.lm import widen
from residual_saes.shared.progress import say
from residual_saes.shared.seal import load_sealed, save_sealed
from residual_saes.shared.shuffle import text_order
from residual_saes.shared.units import parse_count

FAMILIES = ("gpt_neox", "gpt2")  # whose heads, keys and values have one width
_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}  # values of a matrix of logits held at once; on a CPU they stay near its caches
_WARMUP = 1 / 20  # of the steps


@dataclass(kw_only=True, frozen=True, slots=True)
class DistillConfig:
    """What students depend on beside width, seed and cache."""

    tokens: int = option("Tokens that each student is trained on [default: all but the held-out ones, once].", type=parse_count)
    batch: int = option("Sequences in a step.", 32, type=click.IntRange(1, 1 << 20))
    lr: float = option("AdamW's peak learning rate.", 2e-3, type=Number(0, 1, min_open=True))
    weight_decay: float = 0.01
    beta2: float = 0.95
    clip_norm: float = 1.0
    temperature: float = 2.0

    def steps(self, context: int) -> int:
        return self.tokens // (self.batch * context)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0."""
        warmup = max(1, round(_WARMUP * steps))
        left = (steps - step) / max(1, steps - warmup)
        return self.lr * min((step + 1) / warmup, 0.5 * (1 - math.cos(math.pi * min(1.0, left))))


def student_config(teacher: PretrainedConfig, width: int) -> PretrainedConfig:
    """The teacher's configuration at another width: as many blocks, heads as near to the teacher's in width as go into it
    evenly, the inner layer in proportion. Raises UserError where that is not known to give the same architecture."""
    if teacher.model_type not in FAMILIES:
        raise UserError(f"students are built of {' and '.join(FAMILIES)} models alone, this one is a {teacher.model_type}")
    config = copy.deepcopy(teacher)
    head = teacher.hidden_size // teacher.num_attention_heads
    heads = [n for n in range(1, width + 1) if width % n == 0 and _rotates(teacher, width // n)]
    if not heads:
        raise UserError(f"a width of {width} has no heads whose rotated part is even: choose multiples of {head}")
    config.hidden_size = width
    config.num_attention_heads = min(heads, key=lambda n: (abs(math.log(width / n / head)), n))
    inner = "n_inner" if teacher.model_type == "gpt2" else "intermediate_size"
    if getattr(teacher, inner) is not None:  # GPT-2's None is four times the width
        setattr(config, inner, max(1, round(getattr(teacher, inner) * width / teacher.hidden_size)))
    return config


def _rotates(config: PretrainedConfig, head: int) -> bool:
    """Whether heads of this width can be rotated as the teacher's are: pairs of dimensions, at least one."""
    if config.model_type != "gpt_neox":
        return True
    rope = getattr(config, "rope_parameters", None) or {}  # transformers 4 has rotary_pct instead
    share = rope.get("partial_rotary_factor", getattr(config, "rotary_pct", 1.0))
    return int(head * share) >= 2 and int(head * share) % 2 == 0


def make_student(teacher: PretrainedConfig, width: int, seed: int) -> nn.Module:
    """On the CPU, float32, its weights a function of configuration, width and seed. Dropout is off."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: nn.Module = AutoModelForCausalLM.from_config(student_config(teacher, width), dtype=torch.float32)
    return student.eval()


class Target:
    """The teacher's distributions of the next token [..., vocabulary], which students are held against."""

    def __init__(self, logits: Tensor, temperature: float) -> None:
        self.temperature = temperature
        self.log_p = self._soften(logits)
        self._p = self.log_p.exp()

    def _soften(self, logits: Tensor) -> Tensor:
        """ln softmax(logits / temperature), float32 at least."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return torch.log_softmax(wide if self.temperature == 1 else wide / self.temperature, dim=-1)

    def kl(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Σ over tokens of KL(p ‖ q) of a student's logits, a float64 scalar, and ln q."""
        log_q = self._soften(logits)
        return torch.linalg.vecdot(self._p, self.log_p - log_q).sum(dtype=torch.float64), log_q

    def kl_and_grad(self, logits: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Σ over tokens of KL(p ‖ q), and the gradient of that sum / `tokens` with respect to the student's logits."""
        kl, log_q = self.kl(logits)
        return kl, log_q.exp_().sub_(self._p).div_(self.temperature * tokens).to(logits.dtype)


class Texts:
    """The cache's training tokens in the order of a seed: an endless row of epochs, cut into batches."""

    def __init__(self, cache: Cache) -> None:
        """Holds all of them, two or four bytes each."""
        spec = cache.spec
        n = spec.train_blocks * spec.block_sequences
        self._tokens: NDArray[Any] = np.empty((n, spec.context), spec.token_dtype)
        for first in range(0, n, spec.token_chunk):
            last = min(n, first + spec.token_chunk)
            self._tokens[first:last] = cache.read_tokens(first, last)

    def batches(self, config: DistillConfig, seed: int, first: int, last: int) -> Iterator[Tensor]:
        """Batches `first` … `last` − 1, int64 [batch, context]."""
        n, orders = len(self._tokens), dict[int, NDArray[np.int64]]()
        for step in range(first, last):
            rows = []
            for place in range(step * config.batch, (step + 1) * config.batch):
                epoch, at = divmod(place, n)
                if epoch not in orders:
                    orders = {epoch: text_order(n, seed=seed, epoch=epoch)}
                rows.append(orders[epoch][at])
            yield torch.from_numpy(self._tokens[rows].astype(np.int64))


@dataclass(kw_only=True, frozen=True, slots=True)
class Measured:
    """A student on held-out tokens, means in nats: KL over all positions, at the setting's temperature and at 1, and
    cross-entropy over predicted tokens."""

    floor: float
    kl: float
    ce: float


class Teacher:
    """The language model: what students are compared with."""

    def __init__(self, model: nn.Module, device: torch.device, precision: str, temperature: float) -> None:
        self.config = cast(PretrainedConfig, model.config)
        self.device, self._temperature, self._model = device, temperature, model.to(device)
        widen(self._model)
        self._narrow = device.type == "cuda" and precision == "bf16"

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """A student's, [n, context, vocabulary]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._narrow):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    @torch.no_grad()
    def own_logits(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self._model(input_ids=tokens, use_cache=False).logits)

    def parts(self, tokens: Tensor) -> Iterator[Tensor]:
        """As many sequences at a time as their logits allow, on the device."""
        at_once = max(1, _LOGITS[self.device.type] // (tokens.shape[1] * self.config.vocab_size))
        return (part.to(self.device) for part in torch.split(tokens, at_once))

    def train_step(self, students: Sequence["Student"], tokens: Tensor) -> list[float]:
        """One step of each student on tokens [n, context]; their mean KL a token."""
        totals = [torch.zeros((), dtype=torch.float64, device=self.device) for _ in students]
        for part in self.parts(tokens):
            with torch.no_grad():
                target = Target(self.own_logits(part), self._temperature)
            for total, student in zip(totals, students, strict=True):
                logits = self.logits(student.model, part)
                with torch.no_grad():
                    kl, grad = target.kl_and_grad(logits, tokens.numel())
                    total += kl
                logits.backward(grad)  # type: ignore[no-untyped-call]
        for student in students:
            student.update()
        return [float(total) / tokens.numel() for total in totals]

    @torch.inference_mode()
    def measure(self, students: Sequence[nn.Module], tokens: Tensor) -> tuple[float, list[Measured]]:
        """The teacher's own cross-entropy, and each student, on tokens [n, context]."""
        own, sums = 0.0, [[0.0] * 3 for _ in students]
        for part in self.parts(tokens):
            logits = self.own_logits(part)
            soft, plain = Target(logits, self._temperature), Target(logits, 1.0)
            own += _nats(plain.log_p, part)
            for total, student in zip(sums, students, strict=True):
                logits = self.logits(student, part)
                kl, log_q = plain.kl(logits)
                total[0] += float(soft.kl(logits)[0])
                total[1] += float(kl)
                total[2] += _nats(log_q, part)
        positions, predicted = tokens.numel(), tokens[:, 1:].numel()
        losses = [Measured(floor=floor / positions, kl=kl / positions, ce=ce / predicted) for floor, kl, ce in sums]
        return own / predicted, losses


def _nats(log_q: Tensor, tokens: Tensor) -> float:
    return -float(log_q[:, :-1].gather(2, tokens[:, 1:, None]).sum(dtype=torch.float64))


class Student:
    """A student in training, and its state on disk."""

    def __init__(
        self, teacher: Teacher, width: int, seed: int, config: DistillConfig, steps: int, path: Path, digest: str
    ) -> None:
        """Goes on from the state at `path` if there is one of this experiment. Raises UserError for one of another."""
        self.width, self.seed, self.steps, self.path = width, seed, steps, path
        self._config, self._digest = config, digest
        self.model = make_student(teacher.config, width, seed).to(teacher.device)
        self._weights = dict(self.model.named_parameters())
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self._load()

    @property
    def heads(self) -> int:
        return int(cast(PretrainedConfig, self.model.config).num_attention_heads)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self._weights.values())

    def update(self) -> None:
        """AdamW on the gradients that have been gathered."""
        nn.utils.clip_grad_norm_(self._weights.values(), self._config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.rate(self.step, self.steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _belongs(self) -> dict[str, Any]:
        return {"experiment": self._digest, "width": self.width, "seed": self.seed}

    def _tensors(self) -> dict[str, Tensor]:
        moments = {
            f"{key}.{name}": self._optimizer.state[weight][key]
            for name, weight in self._weights.items()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        return {f"weight.{name}": weight.detach() for name, weight in self._weights.items()} | moments

    def save(self) -> None:
        """Replace the state in one move. Raises UserError where the disk does not take it."""
        make_dir(self.path.parent)
        host = {name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}
        save_sealed(self.path, self._belongs() | {"at": self.step}, host)

    def _require_mine(self, tensors: dict[str, Tensor], at: object) -> None:
        """Raises ValueError for what another hand put together: other tensors, or a step that this student never takes."""
        sizes = {name: weight.shape for name, weight in self._weights.items()}
        wanted = {f"{of}.{name}": size for name, size in sizes.items() for of in ("weight", "exp_avg", "exp_avg_sq")}
        wanted |= {f"step.{name}": torch.Size([]) for name in sizes}
        if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
            raise ValueError("its tensors are not this student's")
        if type(at) is not int or not 1 <= at <= self.steps:
            raise ValueError(f"its step is no whole number from 1 to {self.steps:,}")

    def _load(self) -> None:
        if not self.path.exists():
            return
        try:
            tensors, facts = load_sealed(self.path)
            at = facts.pop("at", None)
            if facts != self._belongs():
                raise UserError(f"{self.path} is of another student or experiment: put it back where it belongs, or delete it")
            self._require_mine(tensors, at)
        except ValueError as error:
            say(f"{self.path} is damaged ({error}); that student is trained again from its start", err=True)
            return
        self.step = at
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                self._optimizer.state[weight] = {
                    "step": tensors[f"step.{name}"],
                    **{key: tensors[f"{key}.{name}"].to(weight.device) for key in ("exp_avg", "exp_avg_sq")},
                }
