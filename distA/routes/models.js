import { openai } from '../dialects/openai.js';
import { forwarded } from './forwarded.js';
const get = (url, upstreamPrefix) => ({
    method: 'GET',
    url,
    dialect: openai,
    body: 'none',
    ...(upstreamPrefix === undefined ? {} : { upstreamPrefix })
});
/** The list of models, and one of them; an id may contain slashes (`org/model`). */
const modelRoutes = fastify => forwarded(fastify, [
    get('/v1/models'),
    get('/v1/models/*'),
    get('/models', '/v1'),
    get('/models/*', '/v1')
]);
export default modelRoutes;
