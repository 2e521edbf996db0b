"""vLLM as the engine of the server: `keye serve --engine vllm`."""
