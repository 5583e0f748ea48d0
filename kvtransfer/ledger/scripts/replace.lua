-- Puts a staged inventory in the place of the old one.
-- KEYS: workers, sequence, inventory, events, staging
-- ARGV: worker, epoch, tier, ttl_ms, maxlen, sequence, number of staged hashes
-- Returns the sequence, or -1: what was staged is not all there, or -2: not registered.
local epoch, ttl = ARGV[2], ARGV[4]
if redis.call('HGET', KEYS[1], ARGV[1]) ~= epoch then
  redis.call('UNLINK', KEYS[5])
  return -2
end
if redis.call('SCARD', KEYS[5]) ~= tonumber(ARGV[7]) then
  redis.call('UNLINK', KEYS[5])
  return -1
end
redis.call('UNLINK', KEYS[3])
if redis.call('EXISTS', KEYS[5]) == 1 then
  redis.call('RENAME', KEYS[5], KEYS[3])
  redis.call('PEXPIRE', KEYS[3], ttl)
end
redis.call('SET', KEYS[2], ARGV[6], 'PX', ttl)
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'kind', 'replaced', 'epoch', epoch,
  'sequence', ARGV[6], 'tier', ARGV[3])
return tonumber(ARGV[6])
