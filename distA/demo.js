import { once } from 'node:events';
import { createServer } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
const MODEL = 'demo';
const ANSWER = 'Hello! This answer comes from the demo backend that is built into LLMProxy. ' +
    'It streams one word at a time, as an inference server would, and counts each as a token. ' +
    'Put the URL of your own server into the configuration, and its answers will come instead.';
const WORDS = ANSWER.match(/\S+\s*/g);
const WORD_MS = 20;
/**
 * Starts it on a free port of the loopback interface.
 *
 * @example
 * const demo = await startDemo()
 * await fetch(`${demo.url}/v1/models`)
 * await demo.close()
 */
export async function startDemo() {
    const server = createServer((request, response) => {
        answer(request, response).catch(() => response.destroy());
    });
    // A worker's own: cluster would share the port with the demo backends of the others.
    server.listen({ port: 0, host: '127.0.0.1', exclusive: true });
    await once(server, 'listening');
    server.unref();
    return {
        url: `http://127.0.0.1:${server.address().port}`,
        async close() {
            server.closeAllConnections();
            server.close();
            await once(server, 'close');
        }
    };
}
async function answer(request, response) {
    const body = await readJson(request);
    switch (`${request.method} ${request.url?.split('?')[0]}`) {
        case 'GET /health':
            return json(response, 200, { status: 'ok' });
        case 'GET /v1/models':
            return json(response, 200, {
                object: 'list',
                data: [{ id: MODEL, object: 'model', created: 0, owned_by: 'llmproxy' }]
            });
        case 'GET /v1/models/demo':
            return json(response, 200, { id: MODEL, object: 'model', created: 0, owned_by: 'llmproxy' });
        case 'POST /v1/chat/completions':
            return complete(response, body, CHAT);
        case 'POST /v1/completions':
            return complete(response, body, COMPLETION);
        case 'POST /v1/embeddings':
            return embed(response, body);
        default:
            return json(response, 404, {
                error: { message: 'not found', type: 'invalid_request_error', param: null, code: null }
            });
    }
}
const CHAT = {
    object: 'chat.completion',
    chunk: 'chat.completion.chunk',
    whole: content => ({ message: { role: 'assistant', content } }),
    delta: content => ({ delta: { role: 'assistant', content } }),
    last: { delta: {} }
};
const COMPLETION = {
    object: 'text_completion',
    chunk: 'text_completion',
    whole: text => ({ text }),
    delta: text => ({ text }),
    last: { text: '' }
};
async function complete(response, body, shape) {
    const limit = Number(body.max_completion_tokens ?? body.max_tokens ?? WORDS.length);
    const words = WORDS.slice(0, Math.max(1, limit));
    const finish_reason = words.length < WORDS.length ? 'length' : 'stop';
    const usage = countUsage(body.messages ?? body.prompt, words.length);
    const head = { id: 'demo-1', created: Math.floor(Date.now() / 1000), model: body.model ?? MODEL };
    if (body.stream !== true) {
        const choice = { index: 0, ...shape.whole(words.join('')), finish_reason };
        return json(response, 200, { ...head, object: shape.object, choices: [choice], usage });
    }
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
    const send = (choices, more = {}) => response.write(`data: ${JSON.stringify({ ...head, object: shape.chunk, choices, ...more })}\n\n`);
    for (const word of words) {
        if (response.destroyed)
            return;
        send([{ index: 0, ...shape.delta(word), finish_reason: null }]);
        await sleep(WORD_MS);
    }
    send([{ index: 0, ...shape.last, finish_reason }]);
    const options = body.stream_options;
    if (options?.include_usage)
        send([], { usage });
    response.end('data: [DONE]\n\n');
}
function embed(response, body) {
    const inputs = Array.isArray(body.input) ? body.input : [body.input];
    const data = inputs.map((input, index) => ({
        object: 'embedding',
        index,
        embedding: [String(input).length / 1000, 0.5, 0.25]
    }));
    const { prompt_tokens } = countUsage(body.input, 0);
    const usage = { prompt_tokens, total_tokens: prompt_tokens };
    json(response, 200, { object: 'list', data, model: body.model ?? MODEL, usage });
}
function countUsage(prompt, completion_tokens) {
    const prompt_tokens = JSON.stringify(prompt ?? '').match(/\w+/g)?.length ?? 0;
    return { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens };
}
async function readJson(request) {
    const chunks = [];
    for await (const chunk of request)
        chunks.push(chunk);
    return chunks.length === 0 ? {} : JSON.parse(Buffer.concat(chunks).toString());
}
function json(response, status, body) {
    response.writeHead(status, { 'content-type': 'application/json' });
    response.end(JSON.stringify(body));
}
