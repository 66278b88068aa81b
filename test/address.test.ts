import assert from 'node:assert/strict'
import { type TestContext, test } from 'node:test'
import { addressOf } from '../src/address.ts'
import { answerChat, CHAT, fakeBackend, post, startGateway } from './helper.ts'

const TOKEN = 'admin-token-of-some-length-0123456789'

const ADDRESSES: [text: string | undefined, address: string][] = [
  ['203.0.113.7', '203.0.113.7'],
  ['203.0.113.7:51234', '203.0.113.7'],
  ['::ffff:203.0.113.7', '203.0.113.7'],
  ['::ffff:cb00:7107', '203.0.113.7'],
  ['[::ffff:203.0.113.7]:80', '203.0.113.7'],
  ['2001:DB8:0:0::1', '2001:db8::1'],
  ['[2001:db8::1]', '2001:db8::1'],
  ['[2001:db8::1]:443', '2001:db8::1'],
  ['fe80::1%eth0', 'fe80::1'],
  ...[
    '010.0.0.1',
    '203.0.113.007',
    '0x7f.0.0.1',
    '2130706433',
    '127.1',
    '203.0.113.7:',
    '203.0.113.7:123456',
    '203.0.113.7:80:80',
    '[203.0.113.7]:80',
    '[2001:db8::1',
    '[2001:db8::1]443',
    'unknown',
    '_hidden',
    'localhost',
    '"203.0.113.7"',
    '203.0.113.7%eth0',
    ' ',
    '',
    undefined
  ].map((text): [string | undefined, string] => [text, 'unknown'])
]

test('addresses are read strictly, with the ports and brackets of proxies', () => {
  for (const [text, address] of ADDRESSES)
    assert.equal(addressOf({ ip: text }), address, String(text))
})

/** A gateway behind a proxy, and the status of a request that comes through it. */
async function behindProxy(t: TestContext, config: object, trust_proxy: unknown = ['127.0.0.1']) {
  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    server: { trust_proxy },
    backends: [{ url: backend.url }],
    ...config
  })
  return async (forwarded: string, headers: Record<string, string> = {}) => {
    const { status } = await post(`${gateway.url}/v1/chat/completions`, CHAT, {
      authorization: 'Bearer k',
      'x-forwarded-for': forwarded,
      ...headers
    })
    return status
  }
}

const keyWith = (networks: object) => ({
  auth: { enabled: true, keys: [{ key: 'k', ...networks }] }
})

test('lists of addresses see through ports, and what is no address fails closed', async t => {
  const networks = ['203.0.113.0/24', '2001:db8::/32']
  const denied = await behindProxy(t, keyWith({ denied_ips: networks }))
  const allowed = await behindProxy(t, keyWith({ allowed_ips: networks }))
  const free = await behindProxy(t, keyWith({}))
  for (const [text = '', address] of ADDRESSES) {
    if (text.trim() === '') continue
    const isUnknown = address === 'unknown'
    const isListed = address === '203.0.113.7' || address === '2001:db8::1'
    assert.equal(await denied(text), isUnknown || isListed ? 403 : 200, `denied: ${text}`)
    assert.equal(await allowed(text), isListed ? 200 : 403, `allowed: ${text}`)
  }
  assert.equal(await free('unknown'), 200)
})

test('a trusted proxy is known with its port too, and not by an octal number', async t => {
  const trusted = ['127.0.0.1', '10.0.0.0/8', 'fd00::/8']
  const denied = keyWith({ denied_ips: ['203.0.113.7'] })
  const status = await behindProxy(t, denied, trusted)
  for (const proxy of ['10.0.0.5:1234', '::ffff:10.0.0.5', '[fd00::1]:80', '10.0.0.5']) {
    assert.equal(await status(`203.0.113.7, ${proxy}`), 403, proxy)
    assert.equal(await status(`198.51.100.1, ${proxy}`), 200, proxy)
    assert.equal(await status(`203.0.113.7, 198.51.100.1, ${proxy}`), 200, proxy)
  }
  // 8.0.0.5 where a leading zero makes a number octal: no proxy of ours, and no address.
  assert.equal(await status('198.51.100.1, 010.0.0.5'), 403)

  const everybody = await behindProxy(t, denied, true)
  assert.deepEqual(
    [await everybody('203.0.113.7:80'), await everybody('unknown, 1.1.1.1')],
    [403, 403]
  )
})

test('limits of an address and the lock of the admin API are not passed by other ports or words', async t => {
  const limited = await behindProxy(t, {
    rate_limit: { enabled: true, per_key: { requests_per_minute: 1, burst_size: 1 } }
  })
  assert.equal(await limited('203.0.113.7:1'), 200)
  assert.equal(await limited('203.0.113.7:2'), 429)
  assert.equal(await limited('unknown'), 200)
  assert.equal(await limited('other'), 429)

  const backend = await fakeBackend(t, answerChat)
  const gateway = await startGateway(t, {
    server: { trust_proxy: true },
    backends: [{ url: backend.url }],
    admin: { enabled: true, token: TOKEN }
  })
  const wrong = async (forwarded: string) => {
    const headers = { 'x-admin-token': 'wrong', 'x-forwarded-for': forwarded }
    return (await fetch(`${gateway.url}/admin/backends`, { headers })).status
  }
  for (let port = 1; port <= 10; port++) assert.equal(await wrong(`203.0.113.7:${port}`), 403)
  assert.equal(await wrong('203.0.113.7:11'), 429)
  for (let name = 1; name <= 10; name++) assert.equal(await wrong(`_client${name}`), 403)
  assert.equal(await wrong('_client11'), 429)
})
