"""KV cache: memory ledger, blocks, sequences, prefix and vision caches, index files."""
