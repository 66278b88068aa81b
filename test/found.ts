import { eventually } from './helper.ts'

/** Which backends a gateway has, as its admin API shows them. */

const TOKEN = 'admin-token'
/** What it is asked with, and models are not asked for. */
export const WATCHED = {
  admin: { enabled: true, token: TOKEN },
  routing: { model_discovery: { enabled: false } }
}

export interface Shown {
  name: string
  url: string
  source: string | null
  weight: number
  priority: number
  in_flight: number
  models: string[] | null
}

export async function shown({ url }: { url: string }): Promise<Shown[]> {
  const headers = { 'x-admin-token': TOKEN }
  const response = await fetch(`${url}/admin/backends`, { headers })
  return ((await response.json()) as { backends: Shown[] }).backends
}

export async function names(gateway: { url: string }): Promise<string> {
  return (await shown(gateway)).map(({ name }) => name).join(' ')
}

/** Resolves when these backends are there. */
export async function until(gateway: { url: string }, wanted: string): Promise<void> {
  await eventually(async () => (await names(gateway)) === wanted)
}

export function find(...sources: object[]) {
  return { discovery: { enabled: true, sources } }
}
