-- Takes a worker off, unless another incarnation has its name by now.
-- KEYS: workers, record, sequence, inventory, events
-- ARGV: worker, epoch, maxlen
-- Returns 1 when it was taken off.
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('UNLINK', KEYS[2], KEYS[3], KEYS[4])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[3], '*', 'kind', 'left', 'worker', ARGV[1], 'epoch', ARGV[2])
return 1
