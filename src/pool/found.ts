import { type BackendOptions, nameOf } from './policy.ts'

/** A backend that the configuration does not name, and which source of `discovery` has found it. */
export interface Found {
  source: string
  backend: BackendOptions
}

/**
 * The configured backends, and after them those that were found, each server once: the first that has a URL
 * holds. One whose name is taken goes by the host, port and path of its URL.
 *
 * @returns where each of the found ones comes from, by name, too
 * @example
 * const found = [{ source: 'dns', backend: { name: 'a', url: 'http://b:1', weight: 1, headers: {} } }]
 * joined([{ name: 'a', url: 'http://a:1', weight: 1, headers: {} }], found).backends[1].name // 'b:1'
 */
export function joined(configured: readonly BackendOptions[], found: readonly Found[]) {
  const backends = [...configured]
  const sources = new Map<string, string>()
  const urls = new Set(configured.map(({ url }) => plainUrl(url)))
  const names = new Set(configured.map(nameOf))
  for (const { source, backend } of found) {
    const url = plainUrl(backend.url)
    const own = nameOf(backend)!
    const name = names.has(own) ? nameOf({ url })! : own
    if (urls.has(url) || names.has(name)) continue
    urls.add(url)
    names.add(name)
    sources.set(name, source)
    backends.push({ ...backend, name })
  }
  return { backends, sources }
}

/** The same for all ways to write where a server is. */
function plainUrl(url: string): string {
  return URL.parse(url)?.href.replace(/\/+(v1\/*)?$/, '') ?? url
}
