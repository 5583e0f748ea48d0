-- Applies a run of inventory changes to the set, and announces each.
-- KEYS: workers, record, sequence, inventory, events
-- ARGV: worker, epoch, tier, maxlen, first sequence, then kind and packed 16-byte hashes of each change
-- Returns the last sequence, or -1: not in step (send everything anew), or -2: not registered.
local worker, epoch, tier, maxlen = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local left = redis.call('PTTL', KEYS[2])
if left <= 0 or redis.call('HGET', KEYS[1], worker) ~= epoch then
  return -2
end
local first = tonumber(ARGV[5])
local last = first + (#ARGV - 5) / 2 - 1
local stored = tonumber(redis.call('GET', KEYS[3]) or -1)
if stored == last then
  return last -- it was applied before, and only the answer was lost
end
if stored ~= first - 1 then
  return -1
end

-- First: a Redis that is out of memory refuses this, but lets a script go on that has written anything.
redis.call('SET', KEYS[3], string.format('%.0f', last), 'PX', left)
for i = 6, #ARGV, 2 do
  local kind, packed = ARGV[i], ARGV[i + 1]
  if kind == 'cleared' then
    redis.call('UNLINK', KEYS[4])
  elseif #packed > 0 then
    local hashes = {}
    for at = 1, #packed, 16 do
      hashes[#hashes + 1] = string.sub(packed, at, at + 15)
    end
    redis.call(kind == 'stored' and 'SADD' or 'SREM', KEYS[4], unpack(hashes))
  end
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', maxlen, '*', 'kind', kind, 'epoch', epoch,
    'sequence', string.format('%.0f', first + (i - 6) / 2), 'tier', tier, 'hashes', packed)
end
redis.call('PEXPIRE', KEYS[4], left)
return last
