"""Training steps on fresh random activations, which are made before the clock starts: one SAE's beside the five products and
other libraries, and several SAEs' beside one's."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial

import click
import torch
from torch import Tensor

from bench import limits
from bench.harness import Comparison, Contender, Entry, timed
from bench.peers import STEPS, Peer, PeerFailed, Worker, environment
from bench.setup import Setup
from residual_saes.train.kernels.base import Workspace
from residual_saes.train.layer import queues
from residual_saes.train.sparsity.base import RELU, Hidden, Own, Unfused
from residual_saes.train.sparsity.batchtopk import LargestOfBatch
from residual_saes.train.sparsity.jumprelu import LOG, Jump
from residual_saes.train.sparsity.matryoshka import LargestNested
from residual_saes.train.sparsity.topk import TopK
from residual_saes.train.step import Begun, StepConfig, StepResult, TrainingSae, pick_kernels

LR = 1e-9  # the whole of Adam's work, and an SAE that stays as sparse as it was set
L1 = 1e-5
WAYS = ("dense", "sparse")
SETTINGS = 3


@dataclass(kw_only=True, slots=True)
class Steps:
    """A round is one step of each of these SAEs on each of `batches` batches of fresh activations."""

    saes: list[TrainingSae]
    workspace: Workspace
    tokens: int
    batches: int = 1
    hidden: Hidden = RELU
    result: StepResult | None = None  # the first SAE's last one

    def run(self) -> float:
        batches = [self.batch() for _ in range(self.batches)]
        return timed(lambda: self.take(batches), self.saes[0].device)

    def batch(self) -> Tensor:
        return torch.randn(self.tokens, self.saes[0].d, device=self.saes[0].device).half()

    def take(self, batches: Iterable[Tensor]) -> int:
        """As the trainer does it, and every step to its end; the number of batches."""
        ahead, seen = queues(self.saes[0].device), 0
        begun: list[Begun | None] = [None] * len(self.saes)
        for half in batches:
            x = half if ahead else half.float()
            for which, sae in enumerate(self.saes):
                self._finish(which, begun)
                begun[which] = sae.begin(x, self.workspace, self.hidden)
                if not ahead:
                    self._finish(which, begun)
            seen += 1
        for which in range(len(self.saes)):
            self._finish(which, begun)
        return seen

    def _finish(self, which: int, begun: list[Begun | None]) -> None:
        one, begun[which] = begun[which], None
        if one is not None:
            result = self.saes[which].finish(one, lr=LR, l1=L1, workspace=self.workspace)
            self.result = self.result if which else result

    def note(self) -> str:
        assert self.result is not None
        way = "sparse" if self.result.sparse else "dense"
        return f"{way} backward at L0 {self.result.l0:,.0f}, {type(self.saes[0].kernels).__name__}"


def new_saes(
    setup: Setup, way: str, count: int = 1, *, config: StepConfig | None = None, l0: float = 0, own: tuple[str, ...] = ()
) -> list[TrainingSae]:
    """Equally active ones, so that they cost the same: what the published settings differ in is λ and L0.

    Which way is settled here, not by the number of active entries: each row shows one way. Dense ones start at F / 2.
    """
    config = replace(config or StepConfig(), sparse_below=float(way == "sparse"))
    kernels = pick_kernels("bf16", setup.device)
    saes = [TrainingSae(setup.d, setup.features, config, kernels, setup.device, seed, own) for seed in range(count)]
    for sae in saes:
        if l0 or way == "sparse":
            set_l0(sae, l0 or setup.l0)
    return saes


def set_l0(sae: TrainingSae, l0: float) -> None:
    """The encoder bias at which `l0` features fire on a token of N(0, 1) activations, all equally often."""
    x = torch.randn(64, sae.d, device=sae.device)
    pre = ((x - sae.b_pre) @ sae.w_enc.t()).flatten()
    keep = max(1, round(pre.numel() * l0 / sae.n_features))
    sae.b_enc.fill_(-float(pre.topk(keep).values[-1]))


def set_uneven_l0(sae: TrainingSae, l0: float) -> None:
    """The same mean, but as uneven as trained SAEs are: most features rare, a few on a third of all tokens."""
    share = (1.5 * torch.randn(sae.n_features, device=sae.device)).exp_()
    share = (share * (l0 / share.sum())).clamp_(1e-6, 0.3)
    scale = sae.w_enc.norm(dim=1)
    sae.b_enc.copy_(-scale * torch.special.ndtri((1 - share).double()).float())


def workspace(setup: Setup, saes: int = 1) -> Workspace:
    slots = saes if queues(setup.device) else 1
    return Workspace(setup.tokens, setup.d, setup.features, "bf16", setup.device, slots=slots)


def training(setup: Setup) -> Comparison:
    """One SAE's step, beside the arithmetic of a dense one and beside others'."""
    room = workspace(setup)
    ways = {way: Steps(saes=new_saes(setup, way), workspace=room, tokens=setup.tokens) for way in WAYS}
    if setup.gpu:
        ways |= _more_ways(setup, ways["sparse"])
    names = {"dense": "ours, dense", "sparse": f"ours, sparse, L0≈{setup.l0}"}
    ours = [
        Contender(name=names.get(key, f"ours, {key}"), key=key, role="ours", work=setup.tokens, run=one.run, note=one.note)
        for key, one in ways.items()
    ]
    name = f"SAE step, d={setup.d}, F={setup.features}, {setup.tokens} tokens"
    with ExitStack() as stack:
        peers, absent = start_peers(stack, STEPS, setup, tokens=setup.tokens, work=setup.tokens, against=WAYS)
        return setup.compare("training", name, "tokens", [*ours, *_products(setup), *peers], absent=absent)


def _more_ways(setup: Setup, sparse: Steps) -> dict[str, Steps]:
    """At other L0, as unevenly active as trained SAEs are, and what the recipes have that the published one has not."""
    ways = {f"L0 {l0}": replace(sparse, saes=new_saes(setup, "sparse", l0=l0)) for l0 in setup.l0s}
    ways["uneven"] = replace(sparse, saes=new_saes(setup, "sparse"))
    set_uneven_l0(ways["uneven"].saes[0], setup.l0)
    free = StepConfig(decoder_norm="free")
    ways["free rows"] = replace(sparse, saes=new_saes(setup, "sparse", config=free))
    positive = min(2000, setup.features // 8)  # a token, of which it keeps `l0`
    saes = new_saes(setup, "sparse", config=free, l0=positive)
    return ways | {"BatchTopK": replace(sparse, saes=saes, hidden=LargestOfBatch(setup.l0))}


def _products(setup: Setup) -> list[Contender]:
    """The five of a dense step, and a square one: what the processor reaches when a shape is kind."""
    five = limits.five_products(tokens=setup.tokens, d=setup.d, features=setup.features, device=setup.name)
    side = min(setup.side, setup.features)
    work, flop = setup.tokens, 2 * side**3
    return [
        Contender(
            name="five products", role="limit", work=work, run=five.run, against=WAYS, note=f"best layouts: {five.layouts}",
            figures=lambda: {"flop": five.flop},
        ),
        Contender(
            name=f"a square product of side {side}", role="limit", key="square", work=work * flop / five.flop, against=WAYS,
            run=limits.square_product(side=side, device=setup.name), figures=lambda: {"flop": flop},
        ),
    ]  # fmt: skip


def _peak(steps: Steps) -> Callable[[], Mapping[str, float]]:
    """What the device held at most in one round of these, before there are others."""
    if steps.saes[0].device.type != "cuda":
        return dict
    torch.cuda.reset_peak_memory_stats()
    steps.run()
    peak = {"peak GPU bytes": float(torch.cuda.max_memory_allocated())}
    return lambda: peak


def settings(setup: Setup) -> Comparison:
    """Three SAEs that step one after another on each batch, beside one of them that takes three batches by itself.

    Both do the arithmetic of three steps; what the three can lose is the caches, to one another's weights. Twice the rounds:
    what is asked for here is a difference of two percent, which is what one round is off by.
    """
    rounds, work, contenders = 2 * setup.rounds, SETTINGS * setup.tokens, []
    room = workspace(setup, SETTINGS)
    for way in WAYS:
        three = Steps(saes=new_saes(setup, way, SETTINGS), workspace=room, tokens=setup.tokens)
        ours = Contender(
            name=f"ours, three {way} SAEs, one batch", role="ours", key=way, work=work, run=three.run, note=three.note,
            figures=_peak(three) if way == "dense" else dict,
        )  # fmt: skip
        alone = replace(three, saes=three.saes[:1], batches=SETTINGS).run
        name = f"one {way} SAE, three batches"
        contenders += [ours, Contender(name=name, role="base", key=way, work=work, run=alone, against=(way,))]
    if setup.gpu:
        l0 = setup.open_l0
        mixed = [*new_saes(setup, "dense", l0=l0), *new_saes(setup, "sparse", SETTINGS - 1)]
        steps, name = Steps(saes=mixed, workspace=room, tokens=setup.tokens), f"ours, one dense at L0 {l0}, two sparse"
        contenders.append(Contender(name=name, role="ours", key="mixed", work=work, run=steps.run, note=steps.note))
    name = f"Three settings, {setup.tokens} tokens a batch"
    return setup.compare("settings", name, "tokens", contenders, rounds, note=f"medians of {rounds} rounds")


def kinds(setup: Setup) -> Comparison:
    """Every kind's step at one L0, beside BatchTopK's: what remains is dense or sparse as it is said, for all of them."""
    room, l0, contenders = workspace(setup), setup.l0, []
    hidden = {
        "topk": Unfused(TopK(k=l0)),
        "jumprelu": Jump(factor=1.0),
        "matryoshka": LargestNested(l0),
        "batchtopk that revives": LargestOfBatch(l0).reviving(),
    }
    for way in WAYS:
        base = Steps(saes=new_saes(setup, way, l0=8 * l0), workspace=room, tokens=setup.tokens, hidden=LargestOfBatch(l0))
        name, keys = f"batchtopk, {way}", tuple(f"{kind}, {way}" for kind in hidden)
        contenders.append(Contender(name=name, role="base", key=way, work=setup.tokens, run=base.run, against=keys))
        for key, (kind, layer) in zip(keys, hidden.items(), strict=True):
            own = (LOG,) if kind == "jumprelu" else ()
            steps = replace(base, saes=new_saes(setup, way, l0=8 * l0, own=own), hidden=layer)
            if own:
                steps.saes[0].start_own(steps.batch(), partial(_thresholds, l0))
            contenders.append(
                Contender(name=key, role="ours", key=key, work=setup.tokens, run=steps.run, note=steps.note)
            )  # fmt: skip
    return setup.compare("kinds", f"A step of each kind at L0 {l0}, {setup.tokens} tokens", "tokens", contenders)


def crosscoder(setup: Setup) -> Comparison:
    """A crosscoder's step beside those of as many SAEs of its features as it has layers: the same arithmetic in products."""
    wide, work, contenders = replace(setup, d=setup.cross * setup.d), setup.cross * setup.tokens, []
    for way in WAYS:
        ours = Steps(saes=new_saes(wide, way), workspace=workspace(wide), tokens=setup.tokens)
        base = Steps(saes=new_saes(setup, way), workspace=workspace(setup), tokens=setup.tokens, batches=setup.cross)
        name = f"one {way} SAE, a batch of each layer"
        contenders += [
            Contender(name=f"crosscoder, {way}", role="ours", key=way, work=work, run=ours.run, note=ours.note),
            Contender(name=name, role="base", key=way, work=work, run=base.run, against=(way,)),
        ]
    name = f"A crosscoder's step, {setup.cross} layers, {setup.tokens} tokens"
    return setup.compare("crosscoder", name, "rows of a layer", contenders)


def _thresholds(l0: int, h: Tensor) -> Own:
    """One for all features, which leaves so many a token."""
    return {LOG: h.flatten().topk(l0 * len(h)).values[-1].log().expand(h.shape[1])}


def start_peers(
    stack: ExitStack, peers: tuple[Peer, ...], setup: Setup, *, tokens: int, work: float, against: tuple[str, ...] = ()
) -> tuple[list[Contender], list[Entry]]:
    """The peers that start, as contenders; those that do not, as entries that say why."""
    ready, absent = [], []
    for peer in peers:
        try:
            python = environment(peer, build=setup.whole and not setup.gpu)
            worker = stack.enter_context(closing(Worker(peer, setup.job(tokens), python)))
        except PeerFailed as failure:
            click.echo(str(failure), err=True)
            absent.append(Entry(name=peer.label, role="peer", key=peer.name, failure=str(failure)))
            continue
        note = f"{worker.about['version']}, {worker.about['note']}"
        ready.append(
            Contender(
                name=peer.label, role="peer", key=peer.name, work=work, run=worker.seconds, against=against, note=note
            )
        )  # fmt: skip
    return ready, absent
