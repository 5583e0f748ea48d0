-- Reads who is alive, how far each inventory is, and where the stream ends, all at one moment. Tidies away the names
-- whose record has expired.
-- KEYS: workers, nonce, events
-- ARGV: fresh nonce, prefixes of: record, sequence
-- Returns {nonce, id of the last event or '0-0', record, sequence or -1, record, sequence or -1, ...}.

-- A write, needed or not: on a Redis that refuses it nobody's heartbeat arrives, so its list is not to be believed.
redis.call('SET', KEYS[2], ARGV[1], 'NX')
local last = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
local reply = {redis.call('GET', KEYS[2]), last[1] and last[1][1] or '0-0'}
local members = redis.call('HGETALL', KEYS[1])
for i = 1, #members, 2 do
  local record = redis.call('GET', ARGV[2] .. members[i])
  if record then
    reply[#reply + 1] = record
    reply[#reply + 1] = tonumber(redis.call('GET', ARGV[3] .. members[i + 1]) or -1)
  else
    redis.call('HDEL', KEYS[1], members[i])
  end
end
return reply
