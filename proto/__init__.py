"""The contract between the tiers: values, messages, hashes, settings and errors. No I/O and no torch."""
