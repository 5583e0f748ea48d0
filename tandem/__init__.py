"""The front door for people: command line, offline LLM, the local stack."""
