import { matchesModel, untagged } from '../keys/key.ts'
import type { Backend, Live } from './backend.ts'

/** A model as `GET /v1/models` shows it; whatever else the backend says of it stays. */
export interface ModelCard {
  id: string
  [member: string]: unknown
}

/** A model that a backend is said to serve. */
export interface ModelEntry {
  /** What callers call it; `*` stands for any text. */
  name: string
  /** What the backend calls it, if that is something else. */
  upstream: string | undefined
}

/**
 * The fields of a model that callers may know. The rest may say how a server was started: llama.cpp's router returns
 * its command line with paths and tokens, vLLM the folder of the weights.
 */
const PUBLIC = new Set([
  ...['id', 'object', 'created', 'owned_by', 'name', 'display_name', 'type', 'created_at'],
  ...['max_model_len', 'context_length', 'context_window', 'max_input_tokens', 'max_output_tokens'],
  ...['capabilities', 'input_modalities', 'output_modalities']
])

/** A model with the fields that callers may know. */
export function toPublic(card: ModelCard): ModelCard {
  const shown = Object.fromEntries(Object.entries(card).filter(([field]) => PUBLIC.has(field)))
  const { meta, status } = card as { meta?: unknown; status?: { value?: unknown } | null }
  // llama.cpp: numbers such as n_ctx, and whether it is loaded.
  const numbers = Object.entries(Object(meta)).filter(([, value]) => typeof value === 'number')
  return {
    ...shown,
    id: card.id,
    ...(numbers.length > 0 ? { meta: Object.fromEntries(numbers) } : {}),
    ...(typeof status?.value === 'string' ? { status: { value: status.value } } : {})
  }
}

/** Fields in which servers say how many tokens a context has; llama.cpp has it in `meta`. */
const CONTEXT = ['max_model_len', 'context_length', 'context_window', 'max_input_tokens']

/** The length of a model's context (tokens), where its server says so; else an empty list. */
export function contextOf(card: ModelCard): number[] {
  const meta = Object(card.meta) as { n_ctx?: unknown }
  const found = [...CONTEXT.map(field => card[field]), meta.n_ctx].find(value => Number(value) > 0)
  return found === undefined ? [] : [Number(found)]
}

/** The names that callers use for what a backend calls `upstream`. */
export function publicNames({ config }: Backend, upstream: string): string[] {
  if (config.models === undefined) return [upstream]
  return config.models.flatMap(({ name, upstream: own = name }) => {
    if (isPattern(name)) return matchesModel([name], upstream) ? [upstream] : []
    return untagged(own) === untagged(upstream) ? [name] : []
  })
}

/** The card of a model of which nothing but the name is known. */
export function toCard(id: string): ModelCard {
  return { id, object: 'model', created: 0, owned_by: 'llmproxy' }
}

/**
 * What this backend calls the model that callers call `model`; undefined: it does not serve it. What the
 * configuration says decides, else what the backend lists; as long as neither is known it takes every
 * model.
 */
export function upstreamModel({ config, live }: Backend, model: string): string | undefined {
  if (config.models === undefined) return lists(live, model) ? model : undefined
  const entry = config.models.find(({ name }) => matchesModel([name], model))
  return entry && (entry.upstream ?? model)
}

/** Is it known what this backend serves? */
export function isKnown({ config, live }: Backend): boolean {
  return config.models !== undefined || live.models !== undefined
}

/** Whether all models that this backend serves are known by name. */
export function hasClosedList({ config, live }: Backend): boolean {
  return live.models !== undefined || config.models?.some(({ name }) => isPattern(name)) === false
}

/** Whether this backend lists a model of exactly this name. A pattern, or a backend without a list, fits any name. */
export function isListed({ config, live }: Backend, model: string): boolean {
  if (live.models !== undefined && lists(live, model)) return true
  const bare = untagged(model)
  return config.models?.some(({ name }) => !isPattern(name) && untagged(name) === bare) ?? false
}

/** All models of these backends, each once and in their order; undefined when no backend's are known. */
export function listModels(backends: readonly Backend[]): ModelCard[] | undefined {
  const cards = new Map<string, ModelCard>()
  let hasNames = false
  const add = (card: ModelCard) => {
    if (!cards.has(card.id)) cards.set(card.id, toPublic(card))
  }
  for (const { config, live } of backends) {
    const named = config.models?.filter(({ name }) => !isPattern(name)) ?? []
    const patterns = config.models
      ?.filter(({ name, upstream }) => upstream === undefined && isPattern(name))
      .map(({ name }) => name)
    hasNames ||= live.models !== undefined || named.length > 0
    for (const [id, card] of live.models ?? []) {
      if (patterns === undefined || matchesModel(patterns, id)) add(card)
    }
    for (const { name, upstream = name } of named) {
      const card = live.models?.get(upstream)
      add(
        card === undefined || name === upstream ? { ...toCard(name), ...card } : renamed(card, name)
      )
    }
  }
  return hasNames ? [...cards.values()] : undefined
}

/** What callers may know of a model under another name: not the name at its backend. */
function renamed(card: ModelCard, id: string): ModelCard {
  const { name, display_name, owned_by, ...shown } = toPublic(card)
  return { ...shown, ...toCard(id), created: card.created ?? 0 }
}

export function isPattern(name: string): boolean {
  return name.includes('*')
}

/** Does it list this model, as far as is known? */
function lists({ models }: Live, model: string): boolean {
  if (models === undefined) return true
  const bare = untagged(model)
  return models.has(model) || models.has(bare) || models.has(`${bare}:latest`)
}
