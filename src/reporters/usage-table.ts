import type { Kind, TableColumns } from '../store/table.ts'
import type { UsageRecord } from './record.ts'

const kinds = {
  id: 'id',
  timestamp: 'time',
  user_id: 'key',
  api_key_id: 'key',
  caller: 'key',
  requested_model: 'text',
  model: 'key',
  input_tokens: 'count',
  output_tokens: 'count',
  total_tokens: 'count',
  cached_tokens: 'count',
  cache_write_tokens: 'count',
  reasoning_tokens: 'count',
  exactness: 'key',
  outcome: 'key',
  stream: 'flag',
  cost: 'money',
  currency: 'key',
  tags: 'json',
  endpoint: 'text',
  method: 'key',
  path: 'text',
  backend: 'key',
  backend_url: 'text',
  attempts: 'count',
  continuations: 'count',
  status_code: 'count',
  ttft_ms: 'count',
  duration_ms: 'count',
  request_id: 'key',
  failed_input_tokens: 'count',
  failed_output_tokens: 'count'
} as const satisfies { [Name in keyof UsageRecord]?: Kind }

/** The table that usage records go into. */
export const USAGE_TABLE: TableColumns = {
  kinds,
  indexed: ['timestamp', 'api_key_id', 'user_id', 'model']
}
