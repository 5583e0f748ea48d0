-- Applies a run of inventory changes to the set, and announces each.
-- KEYS: workers, sequence, inventory, events
-- ARGV: worker, epoch, tier, ttl_ms, maxlen, first sequence, then kind and packed 16-byte hashes of each change
-- Returns the last sequence, or -1: not in step (send everything anew), or -2: not registered.
local worker, epoch, tier, ttl, maxlen = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if redis.call('HGET', KEYS[1], worker) ~= epoch then
  return -2
end
local first = tonumber(ARGV[6])
local last = first + (#ARGV - 6) / 2 - 1
local stored = tonumber(redis.call('GET', KEYS[2]) or -1)
if stored == last then
  return last -- it was applied before, and only the answer was lost
end
if stored ~= first - 1 then
  return -1
end

for i = 7, #ARGV, 2 do
  local kind, packed = ARGV[i], ARGV[i + 1]
  if kind == 'cleared' then
    redis.call('UNLINK', KEYS[3])
  elseif #packed > 0 then
    local hashes = {}
    for at = 1, #packed, 16 do
      hashes[#hashes + 1] = string.sub(packed, at, at + 15)
    end
    redis.call(kind == 'stored' and 'SADD' or 'SREM', KEYS[3], unpack(hashes))
  end
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', maxlen, '*', 'kind', kind, 'epoch', epoch,
    'sequence', string.format('%.0f', first + (i - 7) / 2), 'tier', tier, 'hashes', packed)
end
redis.call('SET', KEYS[2], string.format('%.0f', last), 'PX', ttl)
redis.call('PEXPIRE', KEYS[3], ttl)
return last
