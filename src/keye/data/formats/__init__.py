"""How people write conversations down, and how each becomes a sample."""
