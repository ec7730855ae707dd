"""The activation cache, format 2: where every byte is, when it counts as written, and how it is checked.

    <cache>/cache.json               format, spec, digest of the spec; created last and in one step: a cache exists when it does
    <cache>/activations.zarr/        one Zarr v3 group; any Zarr v3 tool reads it
        tokens                       uint16 or uint32 [sequences, context]
        resid_post/00 ...            float16 [tokens, d_model], one uncompressed chunk file per block; or int8 (int8.py)
    <cache>/ledger/<layers>/<block>.json     one entry per committed block of the layers harvested together
    <cache>/ledger/tokens/<chunk>.json       one entry per chunk of the token array
    <cache>/ledger/references/<layer>.json   what an int8 layer's values are stored relative to; settled before its first block
    <cache>/ledger/freed/<layer>.json        the layer's training blocks were removed on purpose; written before they are

A block is a fixed run of whole sequences, the same rows in every layer. It is committed for a layer when a ledger entry
names both, and the entry is created only after every chunk it speaks of is durable; "the chunk file exists" means
nothing. Rows are permuted inside a block by `shuffle.block_rows`. A slice is a sixteenth of a block, with a checksum of
its own. The last `holdout_blocks` blocks are for evaluation alone.

Every JSON file here carries a checksum of itself, an entry also the cache's digest, its own number and its layers, and
whoever reads it compares all of that: bytes of the right kind in the wrong place are damage. An uncompressed chunk is
the array's bytes, so chunks are written and read as they are, at the disk's speed and straight into the caller's memory.
"""

from residual_saes.shared.cache.cache import Cache
from residual_saes.shared.cache.ledger import LEDGER_BYTES_PER_LAYER, BlockStats, LayerTotals, slice_checksums
from residual_saes.shared.cache.spec import ADVICE, CacheSpec, Imported, Precision, Stored
from residual_saes.shared.cache.tokens import TokenChunk

__all__ = [
    "ADVICE", "LEDGER_BYTES_PER_LAYER", "BlockStats", "Cache", "CacheSpec", "Imported", "LayerTotals", "Precision", "Stored",
    "TokenChunk", "slice_checksums",
]  # fmt: skip
