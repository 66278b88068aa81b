import { type Body, folded } from './payload.ts'
import { type Member, membersOf } from './wire/json-scanner.ts'

/**
 * Fields and headers of a request that steer the inference server itself: its scheduler, its cache, its loaded models,
 * its adapters. They affect other callers, so they do not reach a backend unless `server.allow_engine_controls` names
 * them.
 */

/** Fields of request bodies, by the engine that reads them. */
const FIELDS = new Set([
  // vLLM: the order of requests, ids of running requests, transfers between nodes, the key of the prefix cache.
  ...['priority', 'request_id', 'kv_transfer_params', 'ec_transfer_params', 'cache_salt'],
  ...['vllm_xargs', 'logits_processors'],
  // SGLang: the same, sessions, nodes of a cluster, adapters, and code that runs in the server.
  ...['rid', 'extra_key', 'session_params', 'lora_path', 'custom_logit_processor'],
  ...['bootstrap_host', 'bootstrap_port', 'bootstrap_room', 'bootstrap_pair_key'],
  ...['data_parallel_rank', 'routed_dp_rank', 'disagg_prefill_dp_rank'],
  // llama.cpp: a slot and with it the cache of another caller, adapters.
  ...['id_slot', 'slot_id', 'lora'],
  // NVIDIA Dynamo.
  'nvext',
  // Ollama and LM Studio: when the model is unloaded; another model that is loaded beside it.
  ...['keep_alive', 'ttl', 'draft_model'],
  // Ollama's /api/show: megabytes of vocabulary, of which callers may see nothing.
  'verbose',
  // TGI and LoRAX: adapters, and where they come from.
  ...['adapter_id', 'adapter_source', 'api_token'],
  // TensorRT-LLM and LMDeploy: transfers between nodes, adapters, sessions.
  ...['disaggregated_params', 'lora_request', 'session_id', 'migration_request', 'preserve_cache'],
  // OpenRouter, LiteLLM: other models and servers than the gateway has checked.
  ...['models', 'fallbacks', 'route', 'preset', 'context_window_fallbacks'],
  ...['content_policy_fallbacks', 'model_list', 'user_config', 'custom_llm_provider'],
  ...['api_base', 'base_url', 'extra_body', 'extra_headers', 'api_key', 'mock_response', 'cache'],
  ...['litellm_params', 'num_retries', 'provider', 'plugins']
])

/** Ollama's options that make it reload the model, or take resources of others. */
const OPTIONS = new Set([
  ...['num_gpu', 'main_gpu', 'num_thread', 'num_batch'],
  ...['use_mmap', 'use_mlock', 'numa', 'low_vram', 'vocab_only', 'embedding_only', 'f16_kv'],
  ...['logits_all', 'num_gqa']
])
/** The same of TGI's parameters. */
const PARAMETERS = new Set(['adapter_id'])
/** Objects that have fields which steer an engine. */
const WITHIN: [name: string, fields: ReadonlySet<string>][] = [
  ['options', OPTIONS],
  ['parameters', PARAMETERS]
]

/** Headers that steer an engine or a router in front of it, or say who the client is and what it asks for. */
const HEADERS = new Set([
  ...['forwarded', 'x-forwarded', 'via', 'client-ip', 'x-real-ip', 'x-client-ip'],
  ...['x-cluster-client-ip', 'true-client-ip', 'x-originating-ip', 'x-remote-addr', 'x-remote-ip'],
  ...['x-remote-host', 'x-remote-user', 'remote-user', 'proxy-client-ip', 'wl-proxy-client-ip'],
  // Cloudflare, Fastly, Azure, Google, Amazon, Fly.io, Netlify, DigitalOcean.
  ...['cf-connecting-ip', 'cf-connecting-ipv6', 'cf-pseudo-ipv4', 'fastly-client-ip'],
  ...['x-azure-clientip', 'x-azure-socketip', 'x-appengine-user-ip', 'cloudfront-viewer-address'],
  ...['fly-client-ip', 'x-nf-client-connection-ip', 'do-connecting-ip'],
  ...['x-original-url', 'x-original-uri', 'x-original-host', 'x-original-forwarded-for'],
  ...['x-rewrite-url', 'x-host', 'x-http-method', 'x-http-method-override', 'x-method-override'],
  ...['x-conversation-id', 'x-data-parallel-rank', 'x-vllm-priority', 'x-session-token'],
  // llm-d, NVIDIA Dynamo, AIBrix, Ray Serve: which engine, model or rank serves the request.
  ...['x-gateway-destination-endpoint', 'x-smg-target-worker', 'x-smg-routing-key'],
  ...['x-prefiller-host-port', 'x-encoder-hosts-ports', 'x-data-parallel-host-port'],
  ...['x-kv-cache-source-host-port', 'x-worker-instance-id', 'x-prefill-instance-id'],
  ...['x-decode-instance-id', 'x-dp-rank', 'routing-strategy', 'target-pod', 'model'],
  ...['serve_multiplexed_model_id', 'serve-multiplexed-model-id', 'endpoint-load-metrics-format'],
  // The user, as proxies name them to applications.
  ...['x-auth-request-user', 'x-auth-request-email', 'x-auth-request-groups'],
  ...['x-authenticated-user', 'x-webauth-user', 'x-ms-client-principal', 'ssl-client-cert'],
  ...['x-ssl-client-cert', 'x-client-cert', 'client-cert', 'client-cert-chain']
])

/** Beginnings of such headers. */
const HEADER_PREFIXES = [
  ...['x-forwarded-', 'x-original-', 'x-envoy-', 'x-smg-', 'x-gateway-', 'x-llm-d-', 'x-dynamo-'],
  ...['cf-access-', 'x-ms-client-principal-', 'x-goog-authenticated-user-', 'x-amzn-oidc-']
]

/** All of them, for the description of the option. */
export const ENGINE_CONTROLS = [...FIELDS, ...OPTIONS, ...HEADERS].sort()

/** Whether a header steers an engine. The name is in lower case, with hyphens. */
export function isControlHeader(name: string): boolean {
  return HEADERS.has(name) || HEADER_PREFIXES.some(prefix => name.startsWith(prefix))
}

/**
 * Overwrites the fields that steer an engine with spaces, in place, so that every other byte keeps its position.
 *
 * @param allowed names that pass
 */
export function dropControls(body: Body, allowed: ReadonlySet<string>): void {
  const { bytes, members } = body
  for (const [outer, names] of WITHIN) {
    const object = members.find(({ name, start }) => name === outer && bytes[start] === BRACE)
    if (object === undefined || object.end - object.start > MAX_OBJECT) continue
    const inside = bytes.subarray(object.start, object.end)
    blank(inside, membersOf(inside), names, allowed)
  }
  body.members = blank(bytes, members, FIELDS, allowed)
}

const BRACE = 0x7b
const SPACE = 0x20
/** Larger objects (bytes) are rejected before. */
const MAX_OBJECT = 64 * 1024

/** Returns the members that are left. */
function blank(
  bytes: Buffer,
  members: readonly Member[],
  names: ReadonlySet<string>,
  allowed: ReadonlySet<string>
): readonly Member[] {
  const isDropped = ({ name }: Member) => names.has(folded(name)) && !allowed.has(folded(name))
  if (!members.some(isDropped)) return members
  const kept: Member[] = []
  for (const [index, member] of members.entries()) {
    if (!isDropped(member)) kept.push(member)
    // The comma behind it goes too; where it is the last member, the one before it.
    else if (index + 1 < members.length) bytes.fill(SPACE, member.from, members[index + 1]!.from)
    else bytes.fill(SPACE, kept.at(-1)?.end ?? member.from, member.end)
  }
  return kept
}
