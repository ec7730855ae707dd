"""What fixes a synthetic world but for its seed and width. The defaults are those of SynthSAEBench-16k."""

from dataclasses import dataclass, field
from typing import Annotated

from residual_saes.shared.typed import Bounds

_Share = Annotated[float, Bounds(0, 1)]
_Positive = Annotated[float, Bounds(1e-6, 1e6)]
_Number = Annotated[float, Bounds(0, 1e6)]


@dataclass(kw_only=True, frozen=True, slots=True)
class WorldConfig:
    """The law that a world's features follow. Features are numbered from the most frequent to the rarest, roots first."""

    features: Annotated[int, Bounds(2, 1 << 24)] = field(default=16_384, metadata={"help": "True features."})
    zipf: _Positive = field(default=0.5, metadata={"help": "Probabilities fall as rank to the minus this."})
    most_frequent: _Share = field(default=0.4, metadata={"help": "Firing probability of the first feature."})
    least_frequent: _Share = field(default=5e-4, metadata={"help": "Firing probability of the last feature."})
    roots: Annotated[int, Bounds(0, 1 << 24)] = field(
        default=128, metadata={"help": "Trees; what has no room in them stands alone."}
    )
    branching: Annotated[int, Bounds(1, 1 << 16)] = field(default=4, metadata={"help": "Children of a feature."})
    depth: Annotated[int, Bounds(0, 64)] = field(default=3, metadata={"help": "Levels below a root."})
    exclusive: _Share = field(default=1.0, metadata={"help": "Share of parents whose children exclude each other."})
    rank: Annotated[int, Bounds(1, 4096)] = field(default=25, metadata={"help": "Rank of the correlation between features."})
    correlation: _Share = field(default=0.1, metadata={"help": "Scale of the correlation's factors; 0 for none."})
    magnitude: _Number = field(default=5.0, metadata={"help": "Mean magnitude of the first feature."})
    last_magnitude: _Number = field(default=4.0, metadata={"help": "Mean magnitude of the last feature."})
    spread: _Number = field(default=0.5, metadata={"help": "Standard deviation of magnitudes: of a feature, on average."})
    spread_spread: _Number = field(default=0.5, metadata={"help": "And how much that differs between features."})
    bias: _Number = field(default=1.0, metadata={"help": "Length of the vector that is added to every row."})
