import { ollama } from '../dialects/ollama.js';
import { forwarded } from './forwarded.js';
const post = (url, streamsByDefault = false) => ({
    method: 'POST',
    url,
    dialect: ollama,
    body: 'json',
    streamsByDefault
});
const get = (url) => ({ method: 'GET', url, dialect: ollama, body: 'none' });
/** Ollama's native API without what changes the server: no pull, push, create, copy or delete. */
const ollamaRoutes = fastify => forwarded(fastify, [
    post('/api/chat', true),
    post('/api/generate', true),
    post('/api/embed'),
    post('/api/embeddings'),
    post('/api/show'),
    get('/api/tags'),
    get('/api/ps'),
    get('/api/version')
]);
export default ollamaRoutes;
