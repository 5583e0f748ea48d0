-- Registers a worker or renews it, and everything that lives as long as it does.
-- KEYS: workers, record, sequence, inventory, events, nonce
-- ARGV: worker, epoch, record, ttl_ms, maxlen, fresh nonce, takeover ('1' or '0'), prefixes of: sequence, inventory
-- Returns {accepted, nonce, sequence or -1}.
-- A name belongs to the incarnation that registered last. An older one that wakes up gets it back only once the
-- newer one's record has expired.
local worker, epoch, record, ttl, maxlen = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]

redis.call('SET', KEYS[6], ARGV[6], 'NX')
local nonce = redis.call('GET', KEYS[6])

local holder = redis.call('HGET', KEYS[1], worker)
local is_alive = holder and redis.call('EXISTS', KEYS[2]) == 1
if is_alive and holder ~= epoch and ARGV[7] ~= '1' then
  return {0, nonce, -1}
end
if holder and holder ~= epoch then
  redis.call('UNLINK', ARGV[8] .. holder, ARGV[9] .. holder)
end

redis.call('HSET', KEYS[1], worker, epoch)
redis.call('PEXPIRE', KEYS[3], ttl)
redis.call('PEXPIRE', KEYS[4], ttl)
redis.call('SET', KEYS[2], record, 'PX', ttl) -- last: nothing outlives the record
if holder ~= epoch or not is_alive then
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', maxlen, '*', 'kind', 'joined', 'worker', worker, 'epoch', epoch)
end
return {1, nonce, tonumber(redis.call('GET', KEYS[3]) or -1)}
