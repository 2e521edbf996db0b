"""The HTTP server: OpenAI's interface, keye's extensions, and the page."""
