import { SKEW } from './counter.ts'

/**
 * What Redis does for limits: one step over all accounts of a call, by Redis' own clock. It counts as
 * {@link Counter} does; a window of more than 512 in grains of half a second, by which a place comes back late.
 *
 * KEYS: the living replicas, the epoch, news of keys, the numbers of the last order and the last joining of each replica,
 * then the accounts. ARGV[1]: the order, JSON. All names
 * have one hash tag, so that a cluster keeps them together. Slots and what is held stand in an account for each
 * replica by itself: those of one that is not heard of are taken out by whoever comes next.
 */
export const SCRIPT = `
local LEASE, WINDOW, RETRY = 8000, 60000, 1000
local EXACT, GRAIN = 512, 500
-- Keys that are told of in one answer, unless more of them have the same time.
local NEWS = 10000
local MINUTES, DAY = 150000, 86400000
-- Time (ms) after its last request for which usage of a client address is kept, of a quota without a period.
local ADDRESS_KEPT = 62 * DAY
-- Differences of clocks (ms): between gateways and Redis, and of a clock that is set back a little.
local SKEW, STEP = ${SKEW}, 1000
local order = cjson.decode(ARGV[1])
local clock = redis.call('TIME')
local now = order.time or tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local me = order.replica
local numbers = redis.call('HMGET', KEYS[4], me, me .. ':joined')
local last, joined = tonumber(numbers[1] or 0), tonumber(numbers[2] or 0)

-- The clock was ahead when these were last heard of: a dead one would live on until then.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now + LEASE, '+inf')) do
  redis.call('ZADD', KEYS[1], now, id)
end
local alive = {}
local replicas = redis.call('ZRANGEBYSCORE', KEYS[1], now - LEASE, '+inf')
for _, id in ipairs(replicas) do alive[id] = true end

local function sum(numbers)
  local total = 0
  for _, number in pairs(numbers) do total = total + number end
  return total
end

-- Whether a clock that was ahead has left something behind that must be written down.
local is_corrected = false

local function read(index)
  local packed = redis.call('GET', KEYS[4 + index])
  local counter = packed and cmsgpack.unpack(packed)
    or { requests = {}, tokens = {}, slots = {}, held_tokens = {}, held_cost = {} }
  -- Counters of earlier versions have none.
  counter.held_window = counter.held_window or {}
  for _, window in ipairs({ counter.requests, counter.tokens }) do
    local early = 0
    for grain, amount in pairs(window) do
      local time = tonumber(grain)
      if time > now + STEP then early = early + amount end
      if time > now + STEP or time + WINDOW <= now then window[grain] = nil end
    end
    -- The clock was ahead when these were taken: they count as taken now.
    if early > 0 then
      local name = string.format('%d', now)
      window[name] = (window[name] or 0) + early
      is_corrected = true
    end
  end
  for _, share in ipairs({ counter.slots, counter.held_tokens, counter.held_cost, counter.held_window }) do
    for id in pairs(share) do
      if not alive[id] then share[id] = nil end
    end
  end
  return counter
end

local function write(index, counter, account)
  local packed = cmsgpack.pack(counter)
  local key = KEYS[4 + index]
  local keep = next(counter.slots) and DAY or MINUTES
  local before = account.before
  local is_spent = (counter.spent_tokens or 0) + (counter.spent_cost or 0) + before.tokens + before.cost > 0
  if is_spent and (account.total_quota > 0 or counter.start) then
    local finish = counter.finish or 0
    if finish == 0 and not account.is_address then return redis.call('SET', key, packed) end
    keep = math.max(keep, finish == 0 and ADDRESS_KEPT or finish - now + DAY)
  end
  redis.call('SET', key, packed, 'PX', math.floor(keep))
end

local function is_long(window)
  local count = 0
  for _ in pairs(window) do count = count + 1 end
  return count >= EXACT
end

-- Amounts by their times; those of one grain share the time of the latest. What is let through beyond a small
-- limit may be as many.
local function take_grain(window, limit, amount, age)
  local time = math.ceil(now - (age or 0))
  if limit > EXACT or is_long(window) then
    local grain = math.floor(time / GRAIN)
    for other in pairs(window) do
      if math.floor(other / GRAIN) == grain then
        time, amount = math.max(time, tonumber(other)), amount + window[other]
        window[other] = nil
      end
    end
  end
  local name = string.format('%d', time)
  window[name] = (window[name] or 0) + amount
end

local function window_wait(window, limit, amount)
  local excess = sum(window) + amount - limit
  if excess <= 0 then return 0 end
  local grains = {}
  for grain in pairs(window) do grains[#grains + 1] = tonumber(grain) end
  table.sort(grains)
  for _, grain in ipairs(grains) do
    excess = excess - window[string.format('%d', grain)]
    if excess <= 0 then return grain + WINDOW - now end
  end
  return WINDOW
end

local function reset(window)
  local latest = 0
  for grain in pairs(window) do latest = math.max(latest, tonumber(grain)) end
  return latest == 0 and 0 or latest + WINDOW - now
end

local function bucket(counter, account)
  local rate, burst = account.rate, account.burst
  if rate == 0 then return 0, 0 end
  local level = counter.level or burst
  if counter.at and counter.at > now + STEP then counter.at, is_corrected = now, true end
  level = math.min(burst, level + math.max(0, now - (counter.at or now)) / 1000 * rate)
  counter.level, counter.at = level, math.max(now, counter.at or now)
  return level, level >= 1 and 0 or (1 - level) / rate * 1000
end

-- As {@link shareOf}.
local function share_of(account, hold)
  local typical = hold.typical or hold
  local quota = account.reserve == 'typical' and typical or hold
  return { tokens = quota.tokens, cost = quota.cost, window = typical.tokens }
end

local function token_wait(counter, account, share)
  local limit = account.tokens_per_minute
  if limit == 0 then return 0 end
  local wanted = math.min(share.window, limit) + sum(counter.held_window)
  if wanted > limit then return RETRY end
  return window_wait(counter.tokens, limit, wanted)
end

-- A period that begins later than clocks differ comes from a clock that is ahead, or was when it was written.
local function is_ahead(start) return start > now + SKEW end

-- As {@link Counter.spent}. A gateway whose clock is ahead counts in the period that Redis knows.
local function roll(counter, account)
  if account.total_quota == 0 then return end
  local nothing = { tokens = 0, cost = 0 }
  local was_ahead = counter.start and is_ahead(counter.start)
  if counter.start and not was_ahead and (counter.start >= account.start or is_ahead(account.start)) then
    return
  end
  local spent = not counter.start and account.before or nothing
  local last = counter.start and {
    start = counter.start, finish = counter.finish,
    tokens = counter.spent_tokens, cost = counter.spent_cost
  }
  if was_ahead then
    local earlier = counter.last
    local is_of_period = earlier and not is_ahead(earlier.start) and earlier.start >= account.start
    earlier = is_of_period and earlier or nothing
    spent = { tokens = earlier.tokens + last.tokens, cost = earlier.cost + last.cost }
    last = nil
  end
  counter.start, counter.finish, counter.last = account.start, account.finish, last
  counter.spent_tokens, counter.spent_cost = spent.tokens, spent.cost
end

local function has_quota(counter, account, more, but_held)
  if account.total_quota == 0 then return true end
  local unit = account.quota_unit
  local held = but_held and 0 or sum(counter['held_' .. unit])
  local left = account.total_quota - counter['spent_' .. unit] - held
  if more[unit] > 0 then return more[unit] <= left end
  return left > 0
end

local function hold(counter, account, more)
  local share = share_of(account, more)
  counter.held_tokens[me] = (counter.held_tokens[me] or 0) + share.tokens
  counter.held_cost[me] = (counter.held_cost[me] or 0) + share.cost
  counter.held_window[me] = (counter.held_window[me] or 0) + share.window
end

local function spend(counter, account, amount)
  if account.tokens_per_minute > 0 and amount.tokens > 0 then
    take_grain(counter.tokens, account.tokens_per_minute, amount.tokens)
  end
  if account.total_quota > 0 then
    counter.spent_tokens = counter.spent_tokens + amount.tokens
    counter.spent_cost = counter.spent_cost + amount.cost
  end
end

local function refusal(counter, account, uploading)
  local share, least = share_of(account, order.hold), share_of(account, order.least)
  local longest, limit, max = 0, nil, 0
  local function check(name, most, wait)
    if most > 0 and wait > longest then longest, limit, max = wait, name, most end
  end
  local _, for_bucket = bucket(counter, account)
  check('requests_per_second', account.rate, for_bucket)
  local per_minute = account.requests_per_minute
  check('requests_per_minute', per_minute,
    per_minute > 0 and window_wait(counter.requests, per_minute, 1) or 0)
  local for_tokens = order.onlyRates and 0 or token_wait(counter, account, share)
  if least.window > account.tokens_per_minute then for_tokens = math.huge end
  check('tokens_per_minute', account.tokens_per_minute, for_tokens)
  local is_free = order.onlyRates or sum(counter.slots) + (uploading or 0) < account.max_concurrent
  check('max_concurrent', account.max_concurrent, is_free and 0 or RETRY)
  local unit = account.quota_unit
  local is_fresh = account.total_quota > 0 and counter['spent_' .. unit] == 0
  -- An estimate alone rejects nothing permanently.
  local is_alone = is_fresh and sum(counter['held_' .. unit]) == 0
  if not order.onlyRates and not has_quota(counter, account, is_alone and least or share) then
    if has_quota(counter, account, is_fresh and least or share, true) then
      check('reserved_quota', account.total_quota, RETRY)
    else
      check('total_quota', account.total_quota,
        account.finish == 0 and math.huge or math.max(1, account.finish - now))
    end
  end
  if limit then
    local refused = { scope = account.scope, limit = limit, max = max, wait = longest == math.huge and -1 or longest }
    if limit == 'total_quota' or limit == 'reserved_quota' then
      refused.left, refused.needed = account.total_quota - counter['spent_' .. unit], share[unit]
    end
    return refused
  end
end

local function left(counter, account)
  local found = { spent_tokens = counter.spent_tokens or 0, spent_cost = counter.spent_cost or 0 }
  if account.requests_per_minute > 0 then
    local remaining = account.requests_per_minute - sum(counter.requests)
    found.requests = { account.requests_per_minute, math.max(0, remaining), reset(counter.requests) }
  end
  if account.rate > 0 then
    local level = math.max(0, math.floor(counter.level))
    if not found.requests or level < found.requests[2] then
      found.requests = { account.burst, level, (account.burst - counter.level) / account.rate * 1000 }
    end
  end
  if account.tokens_per_minute > 0 then
    local remaining = account.tokens_per_minute - sum(counter.tokens) - sum(counter.held_window)
    found.tokens = { account.tokens_per_minute, math.max(0, remaining), reset(counter.tokens) }
  end
  return found
end

local function each(step)
  local counters = {}
  for index, account in ipairs(order.accounts) do
    counters[index] = read(index)
    roll(counters[index], account)
  end
  return step(counters)
end

local function write_all(counters)
  for index, account in ipairs(order.accounts) do write(index, counters[index], account) end
end

local operations = {}

-- Whether a request would be rejected; takes nothing.
function operations.look()
  return each(function(counters)
    for index, account in ipairs(order.accounts) do
      local refused = refusal(counters[index], account, order.uploading[index])
      if refused then return { refused = refused } end
    end
    return { looked = true }
  end)
end

function operations.reserve()
  return each(function(counters)
    if not order.force then
      for index, account in ipairs(order.accounts) do
        local refused = refusal(counters[index], account)
        if refused then
          if is_corrected then write_all(counters) end
          return { refused = refused }
        end
      end
    end
    local state = {}
    for index, account in ipairs(order.accounts) do
      local counter = counters[index]
      bucket(counter, account)
      if not order.isBooking then
        local per_minute = account.requests_per_minute
        if per_minute > 0 then take_grain(counter.requests, per_minute, 1) end
        if account.rate > 0 then counter.level = counter.level - 1 end
      end
      counter.slots[me] = (counter.slots[me] or 0) + 1
      hold(counter, account, order.hold)
      state[index] = left(counter, account)
    end
    write_all(counters)
    return { accounts = state }
  end)
end

function operations.extend()
  return each(function(counters)
    local has_room = true
    for index, account in ipairs(order.accounts) do
      local counter = counters[index]
      spend(counter, account, order.spent)
      hold(counter, account, order.less)
      -- A part of a quota that is reserved already needs no more of it.
      local share = share_of(account, order.more)
      has_room = has_room and token_wait(counter, account, share) == 0
        and (share[account.quota_unit] == 0 or has_quota(counter, account, share))
    end
    if has_room or order.force then
      for index, account in ipairs(order.accounts) do hold(counters[index], account, order.more) end
    end
    write_all(counters)
    return { held = has_room or order.force }
  end)
end

function operations.settle()
  return each(function(counters)
    for index, account in ipairs(order.accounts) do
      local counter = counters[index]
      spend(counter, account, order.spent)
      local slots = (counter.slots[me] or 1) - 1
      if slots <= 0 then
        counter.slots[me] = nil
        counter.held_tokens[me], counter.held_cost[me], counter.held_window[me] = nil, nil, nil
      else
        counter.slots[me] = slots
        hold(counter, account, order.less)
      end
    end
    write_all(counters)
    return { settled = true }
  end)
end

-- One that was not heard of for too long, or that a new Redis does not know, has to join.
function operations.beat()
  redis.call('ZADD', KEYS[1], now, me)
  -- What came in the same millisecond may be told twice.
  -- After a clock was set back all are sent again: some may have come while it was ahead.
  local since = order.since > now and now - 30 * DAY or order.since
  local news = redis.call('ZRANGEBYSCORE', KEYS[3], since, now, 'WITHSCORES', 'LIMIT', 0, NEWS)
  local heard = #news < 2 * NEWS and now or tonumber(news[#news])
  if heard < now and heard == tonumber(news[2]) then
    news, heard = redis.call('ZRANGEBYSCORE', KEYS[3], since, now, 'WITHSCORES'), now
  end
  return { replicas = #replicas, now = now, heard = heard, news = news }
end

function operations.join()
  local epoch = redis.call('GET', KEYS[2])
  if not epoch then
    epoch = order.fresh
    redis.call('SET', KEYS[2], epoch)
  end
  redis.call('ZADD', KEYS[1], now, me)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - DAY)) do
    redis.call('HDEL', KEYS[4], id, id .. ':joined')
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - DAY)
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - 30 * DAY)
  return { epoch = epoch, now = now, last = last }
end

local function seed(index, account)
  local counter, own = read(index), account.own
  roll(counter, account)
  counter.slots[me] = own.slots > 0 and own.slots or nil
  counter.held_tokens[me] = own.slots > 0 and own.held.tokens or nil
  counter.held_cost[me] = own.slots > 0 and own.held.cost or nil
  counter.held_window[me] = own.slots > 0 and own.held.window or nil
  for _, entry in ipairs(own.requests) do
    take_grain(counter.requests, account.requests_per_minute, entry[2], entry[1])
  end
  for _, entry in ipairs(own.tokens) do
    take_grain(counter.tokens, account.tokens_per_minute, entry[2], entry[1])
  end
  if account.total_quota > 0 then
    counter.spent_tokens = math.max(counter.spent_tokens, own.known.tokens) + own.owed.tokens
    counter.spent_cost = math.max(counter.spent_cost, own.known.cost) + own.owed.cost
  end
  write(index, counter, account)
end

-- What this replica has, in place of what Redis thinks it has, and what Redis has not heard of.
function operations.seed()
  -- A damaged key keeps no replica from joining.
  for index, account in ipairs(order.accounts) do pcall(seed, index, account) end
  return { seeded = true }
end

function operations.leave()
  redis.call('ZREM', KEYS[1], me)
  redis.call('HDEL', KEYS[4], me, me .. ':joined')
  return { left = true }
end

-- It is heard when its time has come.
function operations.tell()
  for _, each in ipairs(order.news) do redis.call('ZADD', KEYS[3], now + order.delay, each) end
  return { told = true }
end

local needs_none = { join = true, leave = true, tell = true }
if not needs_none[order.op] and not alive[me] then return cjson.encode({ lost = true }) end
-- One that was overtaken comes over a connection that its replica has given up, and counts as not heard.
if order.number then
  if order.number <= math.max(last, joined) then return cjson.encode({ lost = true }) end
  redis.call('HSET', KEYS[4], order.op == 'join' and me .. ':joined' or me, order.number)
end
return cjson.encode(operations[order.op]())
`
