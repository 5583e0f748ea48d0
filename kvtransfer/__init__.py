"""Moves KV blocks between pods and keeps the ledger of who owns what. Torch only inside ``transports``."""
