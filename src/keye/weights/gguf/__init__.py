"""GGUF files: reading and checking them, their number formats, names and metadata to and from the official ones."""
