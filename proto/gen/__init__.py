"""Generated from ``proto/tandem.proto`` by ``scripts/gen-proto``; never edited. Only ``proto.wire`` imports it."""
