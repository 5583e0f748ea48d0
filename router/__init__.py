"""The front of the house: OpenAI's HTTP API, routing and recovery. Never imports torch."""
