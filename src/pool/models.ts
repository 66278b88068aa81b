import { matchesModel } from '../keys/key.ts'
import type { Backend } from './backend.ts'

/** A model as `GET /v1/models` shows it; whatever else the backend says of it stays. */
export interface ModelCard {
  id: string
  [member: string]: unknown
}

/** The card of a model of which nothing but the name is known. */
export function toCard(id: string): ModelCard {
  return { id, object: 'model', created: 0, owned_by: 'llmproxy' }
}

/** Must a backend with these `models` be asked what it has? */
export function isDiscovered(configured: readonly string[] | undefined): boolean {
  return configured === undefined || configured.some(isPattern)
}

/**
 * Does this backend serve the model? What the configuration says decides, else what the backend lists;
 * as long as neither is known it takes every model.
 */
export function serves({ config, live }: Backend, model: string): boolean {
  if (config.models !== undefined) return matchesModel(config.models, model)
  // Ollama lists `llama3:latest` and is asked for `llama3`.
  return live.models === undefined || live.models.has(model) || live.models.has(`${model}:latest`)
}

/** Is it known what this backend serves? */
export function isKnown({ config, live }: Backend): boolean {
  return config.models !== undefined || live.models !== undefined
}

/** All models of these backends, each once and in their order; undefined when no backend's are known. */
export function listModels(backends: readonly Backend[]): ModelCard[] | undefined {
  const cards = new Map<string, ModelCard>()
  let hasNames = false
  const add = (card: ModelCard) => {
    if (!cards.has(card.id)) cards.set(card.id, card)
  }
  for (const { config, live } of backends) {
    hasNames ||= live.models !== undefined || config.models?.some(id => !isPattern(id)) === true
    for (const [id, card] of live.models ?? []) {
      if (config.models === undefined || matchesModel(config.models, id)) add(card)
    }
    for (const id of config.models ?? []) if (!isPattern(id)) add(toCard(id))
  }
  return hasNames ? [...cards.values()] : undefined
}

function isPattern(name: string): boolean {
  return name.includes('*')
}
