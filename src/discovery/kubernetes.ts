import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { type Static, Type } from 'typebox'
import { Url } from '../options.ts'
import { hostPort, Scheme } from './address.ts'
import { pause, readLines, type Server, StatusError, withServer } from './ask.ts'
import type { Entry } from './entry.ts'
import type { Watch } from './source.ts'

const ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount'
const file = (name: string, description: string) =>
  Type.String({ minLength: 1, default: `${ACCOUNT}/${name}`, description })

export const KubernetesOptions = Type.Object(
  {
    service: Type.String({
      pattern: '^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$',
      expects: 'the name of a Service',
      description: 'Service whose ready pods are taken'
    }),
    namespace: Type.Optional(
      Type.String({
        pattern: '^[a-z0-9]([-a-z0-9]*[a-z0-9])?$',
        expects: 'the name of a namespace',
        description: 'Its namespace; else KUBERNETES_NAMESPACE, or the one this pod is in'
      })
    ),
    port: Type.Optional(
      Type.Unsafe<number | string>({
        type: ['integer', 'string'],
        check: (port: unknown) =>
          typeof port === 'number'
            ? port > 0 && port < 65536
            : /^(?=.*[a-z])[a-z0-9-]{1,15}$/.test(String(port)),
        expects: 'the number or the name of a port',
        description: 'Port of the pods, by number or by its name in the Service; else its first'
      })
    ),
    label_selector: Type.Optional(
      Type.String({ minLength: 1, description: 'Only EndpointSlices with these labels' })
    ),
    scheme: Scheme,
    api_server: Type.Optional(Url('Where the API is; else that of the cluster this pod is in')),
    ca_file: file('ca.crt', 'Authority of its certificate, PEM'),
    token_file: file('token', 'Token of the service account, read again for each question')
  },
  { additionalProperties: false, description: 'The EndpointSlices of a Service' }
)
type KubernetesOptions = Static<typeof KubernetesOptions>

const TIMEOUT = 10_000
/** How long (s) one watch lasts. A connection that died unnoticed is found out then. */
const WATCH_S = 120
/** Least time (ms) between two questions, however often a watch ends. */
const GAP = 250
const MAX_SLICES = 1_000

/** Lists the EndpointSlices of a Service, watches them, and lists them again when it has fallen behind. */
export function watchKubernetes(options: KubernetesOptions): Watch {
  const { ca_file } = options
  return (say, signal) => {
    // Who speaks to `kubectl proxy` has neither.
    const tls = existsSync(ca_file) || !ca_file.startsWith(ACCOUNT) ? { ca_file } : {}
    return withServer(tls, async server => {
      const api = new Slices(options, server, signal)
      while (!signal.aborted) {
        const listedAt = performance.now()
        say(toEntries(await api.list(), options))
        while (api.isCurrent && !signal.aborted) {
          const watchedAt = performance.now()
          for await (const slices of api.watch()) say(toEntries(slices, options))
          await pause(watchedAt + GAP - performance.now(), signal)
        }
        await pause(listedAt + GAP - performance.now(), signal)
      }
    })
  }
}

interface Slice {
  addressType?: 'IPv4' | 'IPv6' | 'FQDN'
  metadata: { name: string; resourceVersion: string }
  endpoints?: {
    addresses: string[]
    conditions?: { ready?: boolean | null }
    targetRef?: { name?: string; uid?: string }
  }[]
  ports?: { name?: string; port?: number | null }[]
}

interface Change {
  type: 'ADDED' | 'MODIFIED' | 'DELETED' | 'BOOKMARK' | 'ERROR'
  object: Slice & { code?: number; message?: string }
}

const GONE = 410

/** The slices of a Service as the API last told. */
class Slices {
  readonly #options: KubernetesOptions
  readonly #server: Server
  readonly #signal: AbortSignal
  readonly #slices = new Map<string, Slice>()
  /** Undefined where all must be listed again. */
  #version: string | undefined

  constructor(options: KubernetesOptions, server: Server, signal: AbortSignal) {
    this.#options = options
    this.#server = server
    this.#signal = signal
  }

  /** The API still knows what has happened since the last that was heard. */
  get isCurrent(): boolean {
    return this.#version !== undefined
  }

  async list(): Promise<Slice[]> {
    const headers = await this.#headers()
    const list = (await this.#server.json(await this.#url({}), {
      headers,
      timeout: TIMEOUT,
      signal: this.#signal
    })) as { metadata?: { resourceVersion?: string }; items?: Slice[] | null }
    if (!list?.metadata?.resourceVersion) throw new Error('the answer is no EndpointSliceList')
    this.#slices.clear()
    for (const slice of list.items ?? []) this.#keep(slice)
    this.#version = list.metadata.resourceVersion
    return this.#all()
  }

  /** All slices after each change, until the watch ends. */
  async *watch(): AsyncGenerator<Slice[]> {
    const url = await this.#url({
      watch: 'true',
      allowWatchBookmarks: 'true',
      resourceVersion: this.#version!,
      timeoutSeconds: String(WATCH_S)
    })
    const question = {
      headers: await this.#headers(),
      timeout: TIMEOUT,
      idle: WATCH_S * 1000 + TIMEOUT,
      signal: this.#signal
    }
    const answer = await this.#server.ask(url, question).catch(error => {
      if (!(error instanceof StatusError) || error.status !== GONE) throw error
      this.#version = undefined
    })
    if (answer === undefined) return
    for await (const { type, object } of readLines(answer.body) as AsyncGenerator<Change>) {
      if (type === 'ERROR') {
        if (object.code !== GONE) throw new Error(object.message ?? 'the watch has failed')
        this.#version = undefined
        return
      }
      this.#version = object.metadata.resourceVersion
      if (type === 'BOOKMARK') continue
      if (type === 'DELETED') this.#slices.delete(object.metadata.name)
      else this.#keep(object)
      yield this.#all()
    }
  }

  #keep(slice: Slice): void {
    this.#slices.set(slice.metadata.name, slice)
    if (this.#slices.size > MAX_SLICES) throw new Error(`more than ${MAX_SLICES} EndpointSlices`)
  }

  #all(): Slice[] {
    return [...this.#slices.values()]
  }

  async #url(more: Record<string, string>): Promise<string> {
    const { service, label_selector, api_server = clusterUrl() } = this.#options
    const namespace = this.#options.namespace ?? (await ownNamespace())
    const selector = [`kubernetes.io/service-name=${service}`, label_selector ?? []].flat().join()
    const query = new URLSearchParams({ labelSelector: selector, ...more })
    const base = api_server.replace(/\/+$/, '')
    return `${base}/apis/discovery.k8s.io/v1/namespaces/${namespace}/endpointslices?${query}`
  }

  /** The token is renewed about every hour, in its file. */
  async #headers(): Promise<Record<string, string>> {
    const { token_file } = this.#options
    if (token_file.startsWith(ACCOUNT) && !existsSync(token_file)) return {}
    return { authorization: `Bearer ${(await readFile(token_file, 'utf8')).trim()}` }
  }
}

/**
 * Each ready pod once, by its IPv4 address where it has one of each kind. One without the port has no URL: in
 * a rollout that brings the port there are some of both.
 */
function toEntries(slices: Slice[], { port, scheme }: KubernetesOptions): Entry[] {
  const pods = new Map<string, { name: string | undefined; url: string | undefined }>()
  const isOther = ({ addressType }: Slice) => Number(addressType !== 'IPv4')
  for (const { endpoints, ports } of slices.toSorted((a, b) => isOther(a) - isOther(b))) {
    const number = portOf(ports ?? [], port)
    for (const { addresses, conditions, targetRef } of endpoints ?? []) {
      // Not known counts as ready.
      if (conditions?.ready === false) continue
      const address = addresses[0]!
      const url = number === undefined ? undefined : `${scheme}://${hostPort(address, number)}`
      const pod = targetRef?.uid ?? url ?? address
      if (!pods.has(pod)) pods.set(pod, { name: targetRef?.name, url })
    }
  }
  const entries = [...pods.values()]
  if (entries.length > 0 && entries.every(({ url }) => url === undefined)) {
    throw new Error(port === undefined ? 'the Service has no port' : `no port is named ${port}`)
  }
  return entries.sort((a, b) => (a.url ?? '').localeCompare(b.url ?? ''))
}

function portOf(ports: NonNullable<Slice['ports']>, wanted: number | string | undefined) {
  if (typeof wanted === 'number') return wanted
  const found = wanted === undefined ? ports[0] : ports.find(({ name }) => name === wanted)
  return found?.port ?? undefined
}

function clusterUrl(): string {
  const { KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port } = process.env
  return `https://${hostPort(host || 'kubernetes.default.svc', Number(port || 443))}`
}

async function ownNamespace(): Promise<string> {
  const told = process.env.KUBERNETES_NAMESPACE
  const file = `${ACCOUNT}/namespace`
  if (told) return told
  return existsSync(file) ? (await readFile(file, 'utf8')).trim() : 'default'
}
