"""The decode tier: takes KV in, generates."""
