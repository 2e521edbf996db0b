"""Request and response formats: OpenAI's and those of its relatives (Anthropic, SGLang, vLLM)."""
