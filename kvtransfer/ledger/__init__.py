"""The ledger: who is alive, what each worker has cached, and how far each hand-off has come.

It remembers; it does not decide. The wire and the two pools decide, so no failure in here may fail a request: whoever
writes uses ``WorkerPublisher`` or ``HandoffWriter``, which queue, retry and never raise, and whoever reads uses
``LedgerWatcher``, which keeps the last known state. KV data never passes through.

Every key begins with the deployment's namespace, here ``tandem``:

    key                                type     content                                   ends
    tandem:nonce                       string   drawn when Redis is found empty           never
    tandem:workers                     hash     worker → epoch that has the name          tidied when a record is gone
    tandem:worker:<worker>             string   WorkerRecord, msgpack                     heartbeat TTL, deregister
    tandem:sequence:<epoch>            string   number of the last inventory event        heartbeat TTL, deregister
    tandem:inventory:device:<epoch>    set      block hashes, 16 bytes each               heartbeat TTL, deregister
    tandem:staging:device:<epoch>      set      an inventory being sent in parts          renamed, or 60 s
    tandem:events                      stream   joined, left, stored, evicted, cleared,   trimmed to about 4096
                                                replaced
    tandem:handoff:<request>           hash     generation, rank, HandoffRecord           TTL; a terminal one stays as a
                                                                                          tombstone, with a TTL
    tandem:handoffs                    zset     open requests by the time they expire     left at a terminal stage, or
                                                                                          tidied when expired

How it stays right:

- Each write is one Lua script, so a reader sees all of it or nothing. Hand-off writes must go up in (generation,
  stage); others are refused and counted.
- A worker's name belongs to the incarnation that registered last, and an inventory to the incarnation that has the
  name. An older incarnation that wakes up writes nothing.
- Inventory events of one incarnation are numbered without gaps, and the last number is kept beside the set. A reader
  that misses a number, or finds the kept one ahead of what it has read, takes a snapshot. A writer that finds the kept
  one not to be its own last writes everything anew, which is announced as ``replaced``. Equal numbers make a repeated
  write, after a lost answer, harmless.
- An emptied Redis shows as another nonce; every worker then registers and replays its inventory. Readers keep what
  they know meanwhile, and give workers a TTL's time to come back.
- A Redis that takes no writes (out of memory, a disk that it cannot save to) is as good as away, for readers too: the
  records in it expire though their workers live.

Redis must run with ``noeviction``: an evicted key would look like a dead worker. Every process that starts asks, and
warns. What it holds is bounded by the TTLs, the stream's length and 4 KB to an event.
"""
