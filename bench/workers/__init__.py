"""One process per peer, each in the peer's own environment; worker.py holds the protocol."""
