"""What feature pages show of each feature of an SAE, from one read of a site's held-out activations for all of its SAEs, in
memory that does not grow with the text.

z_i is feature i's activation, a row is a held-out token, in the order of the text, counted from the first one held out.

    top         the TOP contexts with the largest z_i, each by the row of its maximum: by (−z_i, row), so ties go to the earlier
    sample      SAMPLES of the rows on which it fires: those with the smallest hash of (feature, row), which is a uniform
                sample without replacement, in any order of reading. Sorted by z_i it shows the quantiles of z_i
    bins        how often z_i > 0 lies in [j w, (j+1) w), j < BINS, w the power of two for which the largest z_i lies in the
                upper half: exact counts, since whenever w doubles each two neighbours become one
    similar     the NEAREST other features by the cosine of decoder rows
    together    the NEAREST other features j by the Jaccard index c / (n_i + n_j − c) of the tokens on which they fire, where
                c, n_i and n_j are counts over random tokens, up to 65,536 of them or, where features are dense, so many that
                2^31 pairs fire; pairs with c < TOGETHER_AT_LEAST are left out
    promoted, suppressed
                the WORDS tokens with the largest and smallest head(norm(d_i)) − head(norm(0)), d_i its decoder row: the
                direct path from a feature to the logits (nostalgebraist 2020), without what the norm's bias adds to each
    logit_bins  how many tokens have which of these, in LOGIT_BINS bins from −m to m, m the largest in size

All ties go to the smaller number. z is float32 as in eval/measure/metrics.py.

Around each row of top and sample the activations of the same feature on BEFORE earlier and AFTER later tokens of the context
are kept. That is what costs memory: F × (TOP + SAMPLES) × (BEFORE + 1 + AFTER) × 4 bytes, 377 MB at F = 32,768.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from residual_saes.eval.measure.active import Encoder
from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site

TOP, SAMPLES, NEAREST, WORDS, LOGIT_BINS = 20, 25, 8, 10, 60
BEFORE, AFTER = 47, 16  # tokens shown around a row: what is before it is what the model had read
BINS = 64
TOGETHER_AT_LEAST = 3  # that two of a few tokens are the same says little

_WINDOW = BEFORE + 1 + AFTER
_EMPTY = torch.iinfo(torch.int64).max  # a key larger than any
_TILE_VALUES = {"cpu": 1 << 25, "cuda": 1 << 28}  # values of z held at once, or one context
_SCORES = 1 << 24  # values of a matrix of features against all features or tokens held at once
_LEAST_EXPONENT = -100  # of a bin's width: what is smaller than 2^-100 counts as that
_TOGETHER_TOKENS = 1 << 16  # at most
_TOGETHER_PAIRS = 1 << 31  # pairs of features on one token, summed over tokens, at most: two minutes of one core
_PAIRS = 1 << 20  # of them held at once


def kept_bytes() -> int:
    """Bytes that a pass holds for each feature, beside the SAE itself."""
    return (TOP + SAMPLES) * (4 * _WINDOW + 16) + 8 * BINS


Block = tuple[int, Tensor]  # the first row's number, and activations float16 [n, d] in the order of the text


def heldout_text(cache: Cache, sites: Sequence[Site], sequences: int) -> Iterator[Block]:
    """The held-out activations of a layer, or of several beside each other, in the order of the text, a block at a time, on the
    CPU: the first `sequences` contexts. Raises UserError for blocks that are not there or damaged."""
    spec = cache.spec
    for block in range(spec.train_blocks, spec.n_blocks):
        before = (block - spec.train_blocks) * spec.block_sequences
        n = min(spec.block_sequences, sequences - before)
        if n <= 0:
            return
        data = [torch.from_numpy(cache.whole_block(site, block)) for site in sites]
        rows = data[0] if len(data) == 1 else torch.cat(data, dim=1)
        ordered = torch.empty_like(rows)
        ordered[torch.from_numpy(cache.block_order(block))] = rows
        yield before * spec.context, ordered[: n * spec.context]


def scatter(feature: Tensor, row: Tensor) -> Tensor:
    """Hash each (feature, row) below (2^31, 2^32) to an int64 of its own: splitmix64 (Steele, Lea & Flood 2014)."""

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # torch's own keeps the sign

    x = (feature << 32 | row) + -0x61C8864680B583EB
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shifted(x, 31)


@dataclass(slots=True)
class _Tile:
    """Activations of whole contexts, as many as are held at once."""

    z: Tensor  # float32 [rows, F]
    first: int  # the first row's number
    context: int

    def around(self, at: Tensor, feature: Tensor) -> Tensor:
        """z of these features on the tokens around these rows of the tile, [n, BEFORE + 1 + AFTER]; 0 outside the context."""
        offsets = torch.arange(-BEFORE, AFTER + 1, device=at.device)
        position = (at % self.context).unsqueeze(1) + offsets
        inside = (position >= 0) & (position < self.context)
        rows = (at.unsqueeze(1) + offsets).clamp(0, len(self.z) - 1)
        return self.z[rows, feature.unsqueeze(1)] * inside


class Kept:
    """The rows with the `size` smallest keys of each feature, and the activations around them."""

    def __init__(self, features: int, size: int, device: torch.device) -> None:
        self.key = torch.full((features, size), _EMPTY, dtype=torch.int64, device=device)
        self.row = torch.full((features, size), -1, dtype=torch.int64, device=device)
        self.window = torch.zeros(features, size, _WINDOW, device=device)
        self._bound = torch.full((features,), _EMPTY, dtype=torch.int64, device=device)  # the largest key that is kept

    def offer(self, feature: Tensor, key: Tensor, at: Tensor, tile: _Tile) -> None:
        """Keep rows `at` of the tile whose keys are small enough: int64 [n] like their features and keys. No key of a feature
        may come twice."""
        near = key < self._bound[feature]
        feature, key, at = feature[near], key[near], at[near]
        order = _by_group(feature, key.argsort())
        rank = _rank(feature[order])
        order, rank = order[rank < self.key.shape[1]], rank[rank < self.key.shape[1]]
        features, group = torch.unique_consecutive(feature[order], return_inverse=True)
        fresh = torch.full((len(features), self.key.shape[1]), _EMPTY, dtype=torch.int64, device=order.device)
        source = torch.zeros_like(fresh)
        fresh[group, rank], source[group, rank] = key[order], at[order]
        self._merge(features, fresh, source, tile)

    def _merge(self, features: Tensor, fresh: Tensor, source: Tensor, tile: _Tile) -> None:
        """Merge new candidates [features, size], which are rows `source` of the tile, into each feature's smallest keys."""
        size = fresh.shape[1]
        both = torch.cat([self.key[features], fresh], 1)
        best = both.argsort(dim=1, stable=True)[:, :size]  # stable: an empty place is not exchanged for another
        stays = torch.zeros_like(both, dtype=torch.bool).scatter_(1, best, True)
        goes, comes = (~stays[:, :size]).nonzero().unbind(1), stays[:, size:].nonzero().unbind(1)
        feature, place, at = features[goes[0]], goes[1], source[comes]
        self.key[feature, place] = fresh[comes]
        self.row[feature, place] = tile.first + at
        self.window[feature, place] = tile.around(at, feature)
        self._bound[features] = self.key[features].amax(1)

    def by_activation(self) -> tuple[Tensor, Tensor]:
        """(rows int64 [F, size], −1 where there is none; activations around them [F, size, window]); the largest first."""
        order = self.row.argsort(dim=1, stable=True)
        value = self.window[:, :, BEFORE].where(self.row >= 0, -1.0).gather(1, order)
        order = order.gather(1, value.argsort(dim=1, descending=True, stable=True))
        return self.row.gather(1, order), self.window.gather(1, order.unsqueeze(2).expand(-1, -1, _WINDOW))


class Histograms:
    """Counts of each feature's activations by bin, and the width of a feature's bins."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.counts = torch.zeros(features, BINS, dtype=torch.int64, device=device)
        self._exponent = torch.full((features,), _LEAST_EXPONENT, dtype=torch.int32, device=device)

    def add(self, feature: Tensor, value: Tensor, largest: Tensor) -> None:
        """Activations > 0 [n] of these features [n]; `largest` [F] of each feature's among them."""
        above = torch.frexp(largest).exponent  # largest < 2^above
        self._widen((above - int(math.log2(BINS))).where(largest > 0, _LEAST_EXPONENT))
        index = torch.ldexp(value, -self._exponent[feature]).long()
        self.counts.view(-1).scatter_add_(0, feature * BINS + index, torch.ones_like(feature))

    def _widen(self, exponent: Tensor) -> None:
        wider = (exponent > self._exponent).nonzero()[:, 0]
        steps = (exponent - self._exponent)[wider].clamp(max=int(math.log2(BINS)))
        index = torch.arange(BINS, device=wider.device) >> steps.unsqueeze(1)
        old = self.counts[wider]
        self.counts[wider] = torch.zeros_like(old).scatter_add_(1, index, old)
        self._exponent = torch.maximum(self._exponent, exponent)

    @property
    def width(self) -> Tensor:
        """Of a bin, float32 [F]."""
        return torch.ldexp(torch.ones_like(self._exponent, dtype=torch.float32), self._exponent)


class Together:
    """Pairs of features that fire on the same tokens, counted on a random sample of the tokens."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        """`tokens` is how many tokens will be read."""
        row = torch.arange(tokens, device=device)
        self._order = scatter(torch.zeros_like(row), row).argsort()[:_TOGETHER_TOKENS]  # a random order of random rows
        self._wanted = torch.zeros(tokens, dtype=torch.bool, device=device).index_fill_(0, self._order, True)
        self._rows: list[Tensor] = []
        self._features: list[Tensor] = []

    def add(self, tile: _Tile) -> None:
        wanted = self._wanted[tile.first : tile.first + len(tile.z)].nonzero()[:, 0]
        at, feature = (tile.z[wanted] > 0).nonzero().unbind(1)
        self._rows.append(tile.first + wanted[at])
        self._features.append(feature.int())

    def nearest(self, features: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """(feature, Jaccard index, tokens on which both fire) [F, NEAREST], −1 and 0 where there is none; and of how many
        tokens."""
        row, feature = torch.cat(self._rows), torch.cat(self._features).long()
        pairs = torch.bincount(row, minlength=len(self._wanted))[self._order].square().cumsum(0)
        used = self._order[pairs <= _TOGETHER_PAIRS]
        kept = torch.zeros_like(self._wanted).index_fill_(0, used, True)[row]
        return *_nearest_together(row[kept], feature[kept], features), len(used)


def _nearest_together(row: Tensor, feature: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest features of all pairs (row, feature that fires on it), rows ascending; in portions, as F × F is too large."""
    n, active = torch.bincount(feature, minlength=features), torch.bincount(row)
    start = active.cumsum(0) - active  # where the features of a row begin
    order = feature.argsort(stable=True)
    ends = _from_zero(n)
    pairs = _from_zero(active[row[order]])[ends]
    parts = []
    for first, last in _portions(pairs.tolist(), _PAIRS, max(1, _SCORES // features)):
        firing = order[int(ends[first]) : int(ends[last])]
        length = active[row[firing]]
        entry = torch.repeat_interleave(length)  # of `firing`, for each feature on at its row
        within = torch.arange(len(entry), device=row.device) - (length.cumsum(0) - length)[entry]
        other = feature[start[row[firing]][entry] + within]
        both = torch.zeros((last - first) * features, dtype=torch.int32, device=row.device)
        pair = (feature[firing] - first)[entry] * features + other
        both = both.scatter_add_(0, pair, both.new_ones(1).expand(len(pair))).view(last - first, features)
        both.diagonal(first).zero_()
        i, j = (both >= TOGETHER_AT_LEAST).nonzero().unbind(1)
        count = both[i, j]
        jaccard = (count.double() / (n[first + i] + n[j] - count)).float()
        value, place = _best(i, jaccard, last - first, NEAREST)
        j, count = torch.cat([j, j.new_full((1,), -1)]), torch.cat([count, count.new_zeros(1)])  # where the place is −1
        parts.append((j[place], value, count[place]))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


def _from_zero(counts: Tensor) -> Tensor:
    """Offsets [n + 1] of groups of these sizes [n]: where each group begins, and where the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _portions(before: list[int], most: int, longest: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of groups with offsets `before`: up to `most` entries each, and from 1 to `longest` groups."""
    first = 0
    while first < len(before) - 1:
        last = first + 1
        while last < len(before) - 1 and last - first < longest and before[last + 1] - before[first] <= most:
            last += 1
        yield first, last
        first = last


def _best(group: Tensor, score: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each group, [groups, k], and their places among all, −1 where there are fewer; of equal ones the
    earlier. `group` and `score` are [n]."""
    order = _by_group(group, score.argsort(descending=True, stable=True))
    rank = _rank(group[order])
    order, rank = order[rank < k], rank[rank < k]
    place = torch.full((groups, k), -1, dtype=torch.int64, device=group.device)
    place[group[order], rank] = order
    value = score.new_zeros(groups, k)
    value[group[order], rank] = score[order]
    return value, place


def _by_group(group: Tensor, order: Tensor) -> Tensor:
    """Sort an order by group; within a group it stays."""
    return order[group[order].argsort(stable=True)]


def _rank(group: Tensor) -> Tensor:
    """How many entries of the same group come before each entry, where a group's entries are neighbours."""
    _, place, counts = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    first: Tensor = (counts.cumsum(0) - counts)[place]
    return torch.arange(len(group), device=group.device) - first


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest of each row of [n, m], m ≥ k; of equal ones those with smaller indices."""
    least = scores.topk(k, dim=1).values[:, -1:]
    row, index = (scores >= least).nonzero().unbind(1)
    value, place = _best(row, scores[row, index], len(scores), k)
    return value, index[place]


def similar(w_dec: Tensor) -> tuple[Tensor, Tensor]:
    """(feature int64, cosine) [F, NEAREST] of the decoder rows [F, d] nearest to each, itself left out."""
    unit, parts = normalize(w_dec, dim=1), []
    rows = max(1, _SCORES // len(unit))
    for start in range(0, len(unit), rows):
        cosines = unit[start : start + rows] @ unit.t()
        cosines.diagonal(start).fill_(-math.inf)
        parts.append(largest(cosines, min(NEAREST, len(unit) - 1)))
    return torch.cat([index for _, index in parts]), torch.cat([value for value, _ in parts])


def words(w_dec: Tensor, unembedding: nn.Module, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(promoted token int64, its logit, suppressed token, its logit) [F, WORDS], of the first `vocabulary` tokens; and how many
    tokens have which logit, int64 [F, LOGIT_BINS], from the one to the other farthest from 0, as far on both sides."""
    nothing, parts = unembedding(torch.zeros_like(w_dec[:1]))[:, :vocabulary], []
    for rows in torch.split(w_dec, max(1, _SCORES // vocabulary)):
        logits = unembedding(rows)[:, :vocabulary] - nothing
        up, promoted = largest(logits, WORDS)
        down, suppressed = largest(-logits, WORDS)
        most = torch.maximum(up[:, 0], down[:, 0]).clamp(min=1e-30)[:, None]
        place = ((logits / most + 1) * (LOGIT_BINS / 2)).long().clamp(0, LOGIT_BINS - 1)
        bins = torch.zeros(len(rows), LOGIT_BINS, dtype=torch.int64, device=rows.device)
        parts.append((promoted, up, suppressed, -down, bins.scatter_add_(1, place, torch.ones_like(place))))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))  # type: ignore[return-value]


class Tally:
    """What the pass keeps of one SAE, on its device."""

    def __init__(self, sae: Sae, tokens: int) -> None:
        """`tokens` is how many tokens will be read."""
        features, device = len(sae.b_enc), sae.b_enc.device
        self.sae, self._encoder = sae, Encoder(sae)
        self.top, self.sample = Kept(features, TOP, device), Kept(features, SAMPLES, device)
        self.histograms, self.together = Histograms(features, device), Together(tokens, device)
        self.maximum = torch.zeros(features, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, x: Tensor, first: int, context: int) -> None:
        """Take float32 activations [n, d] of whole contexts into account; `first` is the number of their first row."""
        z = self._encoder.matrix(x)
        if not self.sae.rows.all:  # what it was not trained on it fires on at random
            z *= self.sae.rows.kept(x, torch.arange(len(x), device=x.device) % context)[:, None]
        tile = _Tile(z, first, context)
        row, feature = tile.z.nonzero().unbind(1)
        value = tile.z[row, feature]
        highest, at = _highest(row, feature, value, tile)
        largest_now = highest.amax(0)
        self.histograms.add(feature, value, largest_now)
        self.maximum = torch.maximum(self.maximum, largest_now)
        self.total += tile.z.sum(0)
        self.together.add(tile)
        self.sample.offer(feature, scatter(feature, first + row), row, tile)
        sequence, feature = highest.nonzero().unbind(1)
        row = at[sequence, feature]
        descending = 0x7FFFFFFF - highest[sequence, feature].view(torch.int32).long()  # positive floats, in order as integers
        self.top.offer(feature, descending << 32 | (first + row), row, tile)

    @torch.inference_mode()
    def columns(self, unembedding: nn.Module, vocabulary: int) -> tuple[dict[str, Tensor], int]:
        """All columns, each [F, …] on the CPU, and on how many tokens `together` was counted."""
        count = self.histograms.counts.sum(1)
        top, top_window = self.top.by_activation()
        sample, sample_window = self.sample.by_activation()
        columns = {
            "count": count,
            "maximum": self.maximum,
            "mean": (self.total / count.clamp(min=1)).float(),
            "bins": self.histograms.counts.int(),
            "bin_width": self.histograms.width,
            "row": torch.cat([top, sample], 1),
            **_near(torch.cat([top_window, sample_window], 1)),
        }
        columns |= zip(("similar", "similar_cosine"), similar(self.sae.w_dec), strict=True)
        if len(self.sae.target.outputs) > 1:
            columns["layer_share"] = self.sae.shares()
        *together, together_tokens = self.together.nearest(len(count))
        columns |= zip(("together", "together_jaccard", "together_count"), together, strict=True)
        names = ("promoted", "promoted_logit", "suppressed", "suppressed_logit", "logit_bins")
        columns |= zip(names, words(self.sae.parts()[-1].w_dec, unembedding, vocabulary), strict=True)
        narrow = {name for name, column in columns.items() if column.dtype == torch.int64 and name != "row"}
        return {name: (c.int() if name in narrow else c).contiguous().cpu() for name, c in columns.items()}, together_tokens


def _highest(row: Tensor, feature: Tensor, value: Tensor, tile: _Tile) -> tuple[Tensor, Tensor]:
    """(largest activation, the first row that has it) [contexts, F] of each feature in each context; of those that fire."""
    contexts, features = len(tile.z) // tile.context, tile.z.shape[1]
    place = row // tile.context * features + feature
    highest = value.new_zeros(contexts * features).scatter_reduce_(0, place, value, "amax")
    first = value == highest[place]
    at = row.new_full((contexts * features,), len(tile.z)).scatter_reduce_(0, place[first], row[first], "amin")
    return highest.view(contexts, features), at.view(contexts, features)


def _near(window: Tensor) -> dict[str, Tensor]:
    """Windows [F, n, BEFORE + 1 + AFTER] as lists of what is not zero: of (feature, n), `near_at` tokens after its row the
    activation `near_value`, at places near_start[…] to near_start[… + 1]; most are zero."""
    flat = window.view(-1, _WINDOW)
    place, at = (flat > 0).nonzero().unbind(1)
    return {
        "near_start": _from_zero(torch.bincount(place, minlength=len(flat))),
        "near_at": (at - BEFORE).to(torch.int8),
        "near_value": flat[place, at],
    }


@torch.inference_mode()
def look(blocks: Iterable[Block], saes: list[Sae], context: int, tokens: int) -> list[Tally]:
    """One pass over `tokens` held-out activations for all SAEs, which are over the same layer and on one device."""
    device = saes[0].b_enc.device
    tallies = [Tally(sae, tokens) for sae in saes]
    rows = max(1, _TILE_VALUES[device.type] // max(len(sae.b_enc) for sae in saes) // context) * context
    for first, block in blocks:
        for start in range(0, len(block), rows):
            x = block[start : start + rows].to(device).float()
            for tally in tallies:
                tally.add(x, first + start, context)
    return tallies
