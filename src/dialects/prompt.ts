/** How an API passes a request to the model. */
export interface PromptForm {
  /** Fields of the request that the model reads. Text in other fields costs no tokens. */
  fields: readonly string[]
  /** What the server adds to the text: forms with the same one share what is learned about it. */
  frame: (typeof FRAMES)[number]
}

/** `plain`: at most marks of the beginning and the end; the others: a chat template, around JSON of their own. */
export const FRAMES = ['plain', 'chat', 'messages', 'responses', 'generate'] as const

export const CHAT: PromptForm = {
  fields: ['messages', 'tools', 'functions', 'documents'],
  frame: 'chat'
}
export const COMPLETION: PromptForm = { fields: ['prompt', 'suffix'], frame: 'plain' }
export const EMBEDDING: PromptForm = { fields: ['input', 'messages'], frame: 'plain' }
export const RANKING: PromptForm = {
  fields: ['query', 'documents', 'texts', 'text_1', 'text_2', 'queries', 'items'],
  frame: 'plain'
}
export const MESSAGES: PromptForm = { fields: ['system', 'messages', 'tools'], frame: 'messages' }
export const RESPONSE: PromptForm = {
  fields: ['instructions', 'input', 'tools'],
  frame: 'responses'
}
export const GENERATION: PromptForm = {
  fields: ['system', 'prompt', 'suffix', 'context'],
  frame: 'generate'
}

/** Fields with tools, for which chat templates have instructions of their own. */
export const TOOLS = ['tools', 'functions']
