"""The engine behind HTTP, in OpenAI's format: `protocol` says what a body means, `app` answers it."""
