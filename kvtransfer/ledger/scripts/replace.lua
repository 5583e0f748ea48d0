-- Puts a staged inventory in the place of the old one.
-- KEYS: workers, record, sequence, inventory, events, staging
-- ARGV: worker, epoch, tier, maxlen, sequence, number of staged hashes
-- Returns the sequence, or -1: what was staged is not all there, or -2: not registered.
local epoch, left = ARGV[2], redis.call('PTTL', KEYS[2])
if left <= 0 or redis.call('HGET', KEYS[1], ARGV[1]) ~= epoch then
  redis.call('UNLINK', KEYS[6])
  return -2
end
if redis.call('SCARD', KEYS[6]) ~= tonumber(ARGV[6]) then
  redis.call('UNLINK', KEYS[6])
  return -1
end
-- First: a Redis that is out of memory refuses this, but lets a script go on that has written anything.
redis.call('SET', KEYS[3], ARGV[5], 'PX', left)
redis.call('UNLINK', KEYS[4])
if redis.call('EXISTS', KEYS[6]) == 1 then
  redis.call('RENAME', KEYS[6], KEYS[4])
  redis.call('PEXPIRE', KEYS[4], left)
end
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[4], '*', 'kind', 'replaced', 'epoch', epoch,
  'sequence', ARGV[5], 'tier', ARGV[3])
return tonumber(ARGV[5])
