-- Moves hand-offs forward. A write that is not above what is recorded, in (generation, rank), is refused.
-- KEYS: open hand-offs, then one record key for each write
-- ARGV: ttl_ms, tombstone_ttl_ms, then for each write: request, generation, rank, is terminal ('1' or '0'), record
-- Returns for each write 1 when it holds (written now, or exactly this was written before), else 0.
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)

local held = {}
for i = 2, #KEYS do
  local at = 3 + (i - 2) * 5
  local request, generation, rank = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  local is_terminal, record = ARGV[at + 3] == '1', ARGV[at + 4]
  local seen = redis.call('HMGET', KEYS[i], 'generation', 'rank', 'record')
  local seen_generation, seen_rank = tonumber(seen[1] or -1), tonumber(seen[2] or -1)

  if generation > seen_generation or (generation == seen_generation and rank > seen_rank) then
    local ttl = is_terminal and ARGV[2] or ARGV[1]
    redis.call('HSET', KEYS[i], 'generation', ARGV[at + 1], 'rank', ARGV[at + 2], 'record', record)
    redis.call('PEXPIRE', KEYS[i], ttl)
    if is_terminal then
      redis.call('ZREM', KEYS[1], request)
    else
      redis.call('ZADD', KEYS[1], now_ms + ttl, request)
    end
    held[#held + 1] = 1
  else
    held[#held + 1] = record == seen[3] and 1 or 0
  end
end
-- Last: a script that has written anything, be it to make room, is let go on by a Redis that is out of memory.
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
return held
