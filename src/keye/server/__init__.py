"""`keye serve`: the OpenAI-compatible HTTP interface of the engine."""
