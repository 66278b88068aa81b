import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import type { TestContext } from 'node:test'
import { closedPort, eventually } from './helper.ts'
import { folder } from './process.ts'

/** A real etcd for a test, where the program is installed. */

export const NO_ETCD = spawnSync('etcd', ['--version']).error ? 'etcd is not installed' : false

export interface Etcd {
  url: string
  put(key: string, value: string): Promise<void>
  delete(key: string): Promise<void>
  /** Forgets all that was before now. */
  compact(): Promise<void>
  /** Asks for a user from now on. */
  requireUser(name: string, password: string): Promise<void>
  stop(): Promise<void>
}

interface Answer {
  token?: string
  header?: { revision: string }
}

export async function startEtcd(t: TestContext): Promise<Etcd> {
  const url = `http://127.0.0.1:${await closedPort()}`
  const peer = `http://127.0.0.1:${await closedPort()}`
  const child = spawn(
    'etcd',
    [
      ...['--data-dir', folder(t), '--log-level', 'fatal'],
      ...['--listen-client-urls', url, '--advertise-client-urls', url],
      ...['--listen-peer-urls', peer, '--initial-advertise-peer-urls', peer],
      ...['--initial-cluster', `default=${peer}`]
    ],
    { stdio: 'ignore' }
  )
  const exit = once(child, 'exit')
  t.after(async () => {
    child.kill('SIGKILL')
    await exit
  })
  let token = ''
  const ask = async (path: string, body: object): Promise<Answer> => {
    const headers = token === '' ? {} : { authorization: token }
    const response = await fetch(`${url}/v3/${path}`, {
      method: 'POST',
      headers,
      body: JSON.stringify(body)
    })
    if (!response.ok) throw new Error(`${path}: ${await response.text()}`)
    return (await response.json()) as Answer
  }
  const isUp = () =>
    fetch(`${url}/health`).then(
      response => response.ok,
      () => false
    )
  await eventually(isUp)
  const encode = (text: string) => Buffer.from(text).toString('base64')
  return {
    url,
    async put(key, value) {
      await ask('kv/put', { key: encode(key), value: encode(value) })
    },
    async delete(key) {
      await ask('kv/deleterange', { key: encode(key) })
    },
    async compact() {
      const { header } = await ask('kv/range', { key: encode('x') })
      const { revision } = header!
      await ask('kv/compaction', { revision, physical: true })
    },
    async requireUser(name, password) {
      await ask('auth/user/add', { name, password })
      await ask('auth/role/add', { name: 'root' })
      await ask('auth/user/grant', { user: name, role: 'root' })
      await ask('auth/enable', {})
      token = (await ask('auth/authenticate', { name, password })).token!
    },
    async stop() {
      child.kill('SIGKILL')
      await exit
    }
  }
}
