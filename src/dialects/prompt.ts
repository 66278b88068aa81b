/** How an API passes a request to the model. */
export interface PromptForm {
  /** Fields of the request that the model reads. Text in fields of neither list costs no tokens. */
  fields: readonly string[]
  /**
   * Fields that only some servers or chat templates put into the prompt. A limit counts their text, because the
   * gateway does not know which server does. It teaches nothing about tokens, because others ignore it.
   */
  optional?: readonly string[]
  /** Text that the server adds. Forms with the same frame share what is learned about it. */
  frame: (typeof FRAMES)[number]
  /** Fields that the model reads again with each element of the others: a query with each document. */
  repeated?: readonly string[]
}

/** `plain`: at most marks of the beginning and the end; the others: a chat template, around JSON of their own. */
export const FRAMES = ['plain', 'chat', 'messages', 'responses', 'generate'] as const

/** vLLM, SGLang, llama.cpp: a template of the caller's own, and values that templates insert. */
const TEMPLATED = ['chat_template', 'chat_template_kwargs', 'documents']

export const CHAT: PromptForm = {
  fields: ['messages', 'tools', 'functions'],
  // TGI has `guideline` and `tool_prompt`. Some templates show the model the schema of the response.
  optional: [...TEMPLATED, 'response_format', 'prediction', 'guideline', 'tool_prompt'],
  frame: 'chat'
}
export const COMPLETION: PromptForm = {
  fields: ['prompt', 'suffix'],
  optional: ['prompt_embeds'],
  frame: 'plain'
}
export const EMBEDDING: PromptForm = {
  fields: ['input', 'messages'],
  // llama.cpp reads `content` as `input`.
  optional: [...TEMPLATED, 'content', 'instruction', 'prompt_embeds'],
  frame: 'plain'
}
export const RANKING: PromptForm = {
  fields: [
    ...['query', 'documents', 'texts', 'text_1', 'text_2'],
    ...['queries', 'items', 'data_1', 'data_2']
  ],
  // vLLM has `instruction`, SGLang `instruct`.
  optional: ['chat_template', 'chat_template_kwargs', 'instruction', 'instruct'],
  frame: 'plain',
  repeated: ['query', 'instruction', 'instruct']
}
export const MESSAGES: PromptForm = {
  fields: ['system', 'messages', 'tools'],
  optional: [...TEMPLATED, 'output_config', 'output_format'],
  frame: 'messages'
}
export const RESPONSE: PromptForm = {
  fields: ['instructions', 'input', 'tools'],
  // `text` has the schema of the response, `prompt` variables of a stored prompt; the last one is vLLM's.
  optional: [...TEMPLATED, 'text', 'prompt', 'previous_input_messages'],
  frame: 'responses'
}
export const GENERATION: PromptForm = {
  fields: ['system', 'prompt', 'suffix', 'context'],
  optional: ['template'],
  frame: 'generate'
}

/** The forms of all APIs. */
export const FORMS: readonly PromptForm[] = [
  ...[CHAT, COMPLETION, EMBEDDING, RANKING],
  ...[MESSAGES, RESPONSE, GENERATION]
]

/** Fields with tools, for which chat templates have instructions of their own. */
export const TOOLS = ['tools', 'functions']

/**
 * Fields that make a prompt of any length: a template can repeat what it inserts, and a tensor can have more rows
 * than its bytes show.
 */
export const OPEN = ['template', 'chat_template', 'prompt_embeds']
