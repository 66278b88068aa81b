import { mkdirSync, readFileSync, unwatchFile, watchFile } from 'node:fs';
import { dirname, resolve } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import cors from '@fastify/cors';
import Fastify, { LogController } from 'fastify';
import { pino } from 'pino';
import pretty from 'pino-pretty';
import gateway, { answerError } from './app.js';
import { loadConfig } from './config.js';
import { openaiError } from './dialects/openai.js';
import { GatewayError } from './errors.js';
import { VERSION } from './version.js';
/** The line that tells that calls can be made. */
export const LISTENING = 'LLMProxy is listening';
const WATCH_INTERVAL = 1_000;
/** Serves in this process. `peers`: the other workers, if it is one of several. */
export async function startServer(started, dataDir, peers) {
    let config = started;
    const log = createLog(config.log, dataDir);
    const { fastify, control: gateway } = await createApp(config, log, peers);
    const url = await listen(fastify, config.server.listen);
    const address = { version: VERSION, node: process.version, url };
    // Of several workers the primary says this, once.
    const level = peers === undefined ? 'info' : 'debug';
    log[level](address, LISTENING);
    if (peers === undefined)
        sayDemo(log, gateway, url);
    const idle = giveMemoryBack(gateway.exchanges);
    const { enabled, cert_file, key_file, client_ca_file } = config.server.tls;
    const files = [cert_file, key_file, client_ca_file].filter(file => enabled && file !== undefined);
    for (const file of files) {
        watchFile(file, { interval: WATCH_INTERVAL, persistent: false }, renewTls);
    }
    function renewTls() {
        try {
            ;
            fastify.server.setSecureContext(readTls(config.server.tls));
            log.info('TLS certificate renewed');
        }
        catch (error) {
            log.error({ err: error }, 'the changed TLS files cannot be used; the last good ones stay');
        }
    }
    return {
        url,
        log,
        gateway,
        async reload(changed) {
            await gateway.reload(sections(changed));
            config = changed;
            log.level = changed.log.level;
        },
        async close() {
            for (const file of files)
                unwatchFile(file);
            clearInterval(idle);
            log[level]('shutting down');
            await fastify.close();
            log[level]('stopped');
        }
    };
}
/**
 * Reads the file again when it changes, and when `reload` is called; a broken one is refused and the
 * last good one stays.
 */
export function followFile(file, running, server) {
    const { log } = server;
    async function reload() {
        try {
            const changed = await loadConfig(file);
            await server.reload(changed);
            const names = needRestart(running, changed);
            if (names.length > 0)
                log.warn({ sections: names }, 'changes that need a restart');
            log.info({ config: file }, 'configuration reloaded');
        }
        catch (error) {
            log.error({ config: file, errors: error.message.split('\n') }, 'reload refused');
        }
    }
    const onChange = () => void reload();
    watchFile(file, { interval: WATCH_INTERVAL, persistent: false }, onChange);
    return { reload, stop: () => unwatchFile(file, onChange) };
}
/** Everything that is not in use goes back to the operating system. */
export function collectGarbage() {
    setFlagsFromString('--expose-gc');
    runInNewContext('gc')({ type: 'major', execution: 'sync', flavor: 'last-resort' });
}
/** How long (ms) nothing may have been forwarded: after the start, and after work. */
const FRESH_MS = 3_000;
const IDLE_MS = 45_000;
/** Fewer than this have not warmed anything up. */
const FRESH_EXCHANGES = 10;
/**
 * V8 keeps the memory of the start, and of the busiest moment. When nothing has been forwarded for a
 * while it is told, once, to give back what it can. That pauses the process for some 50 ms and costs it
 * its compiled code, so it is not done in every lull.
 */
function giveMemoryBack(exchanges) {
    let forwarded = -1;
    let idleSince = 0;
    return setInterval(() => {
        const now = performance.now();
        const wait = exchanges.forwarded < FRESH_EXCHANGES ? FRESH_MS : IDLE_MS;
        if (exchanges.forwarded !== forwarded || exchanges.open.length > 0) {
            forwarded = exchanges.forwarded;
            idleSince = now;
        }
        else if (now - idleSince >= wait) {
            collectGarbage();
            idleSince = Number.POSITIVE_INFINITY;
        }
    }, 1_000).unref();
}
/** The gateway in a Fastify server of its own, as the configuration has it, not listening yet. */
export async function createApp(config, log, peers) {
    const { server } = config;
    const fastify = Fastify({
        ...(server.tls.enabled ? { https: readTls(server.tls) } : {}),
        http: {
            maxHeaderSize: server.max_header_bytes,
            headersTimeout: server.header_timeout,
            connectionsCheckingInterval: 500
        },
        // 0: the time for the body is limited, the time an answer takes is not.
        connectionTimeout: 0,
        requestTimeout: server.read_timeout,
        keepAliveTimeout: server.idle_timeout,
        bodyLimit: server.max_body_size,
        trustProxy: server.trust_proxy,
        requestIdHeader: false,
        forceCloseConnections: true,
        return503OnClosing: false,
        loggerInstance: log,
        childLoggerFactory: (logger) => logger,
        logController: new QuietLog({ disableRequestLogging: true }),
        clientErrorHandler: answerClientError,
        frameworkErrors: answerError,
        routerOptions: { maxParamLength: 500 },
        exposeHeadRoutes: true
    });
    fastify.setErrorHandler(answerError);
    if (server.cors.enabled)
        await fastify.register(cors, corsOptions(server.cors));
    let control;
    await fastify.register(gateway, {
        ...sections(config),
        proxy: { write_timeout: server.write_timeout },
        drain_timeout: server.drain_timeout,
        ownsNotFound: true,
        ...(peers === undefined ? {} : { peers }),
        onGateway: (created) => {
            control = created;
        }
    });
    await fastify.ready();
    return { fastify, control };
}
/** The gateway logs a line for each exchange itself; Fastify's own would hold URLs with their queries. */
class QuietLog extends LogController {
    streamError() { }
    routeNotFound() { }
    serviceUnavailable() { }
}
/** The sections of the file that the gateway plugin takes. */
function sections({ backends, routing, health_check, auth, rate_limit, usage, metrics }) {
    return { backends, routing, health_check, auth, rate_limit, usage, metrics };
}
/** Names of the settings that differ but can't be changed while running. */
function needRestart(before, after) {
    const names = ['server', 'log'].flatMap(section => Object.keys(after[section])
        .filter(name => `${section}.${name}` !== 'log.level')
        .filter(name => !isDeepStrictEqual(member(before[section], name), member(after[section], name)))
        .map(name => `${section}.${name}`));
    return isDeepStrictEqual(before.metrics, after.metrics) ? names : [...names, 'metrics'];
}
function member(section, name) {
    return section[name];
}
function readTls(tls) {
    return {
        cert: readFileSync(tls.cert_file),
        key: readFileSync(tls.key_file),
        minVersion: 'TLSv1.2',
        ...(tls.client_ca_file === undefined ? {} : { ca: readFileSync(tls.client_ca_file) }),
        requestCert: tls.client_auth !== 'none',
        rejectUnauthorized: tls.client_auth === 'require'
    };
}
const CORS_METHODS = ['GET', 'POST', 'PUT', 'DELETE', 'OPTIONS'];
function corsOptions(options) {
    const all = options.allowed_origins.includes('*');
    return {
        origin: all && !options.allow_credentials ? '*' : all ? true : options.allowed_origins,
        methods: options.allowed_methods.length > 0 ? options.allowed_methods : CORS_METHODS,
        ...(options.allowed_headers.length > 0 ? { allowedHeaders: options.allowed_headers } : {}),
        exposedHeaders: options.expose_headers,
        credentials: options.allow_credentials,
        ...(options.max_age > 0 ? { maxAge: options.max_age } : {})
    };
}
export function createLog(options, dataDir) {
    const settings = { level: options.level, base: null };
    if (options.output === 'file') {
        const path = resolve(dataDir, options.file.path);
        mkdirSync(dirname(path), { recursive: true });
        return pino(settings, pino.destination({ ...LOG_QUEUE, dest: path }));
    }
    const fd = options.output === 'stdout' ? 1 : 2;
    const isTerminal = options.output === 'stdout' ? process.stdout.isTTY : process.stderr.isTTY;
    if (options.format === 'text' || (options.format === 'auto' && isTerminal)) {
        return pino(settings, pretty({ destination: fd, sync: true, singleLine: true, translateTime: 'SYS:HH:MM:ss.l' }));
    }
    return pino(settings, pino.destination({ ...LOG_QUEUE, dest: fd }));
}
/** Lines are written beside the work, some at a time; when nobody reads them they are dropped at last. */
const LOG_QUEUE = { sync: false, minLength: 4096, periodicFlush: 100, maxLength: 8 * 1024 * 1024 };
async function listen(fastify, address) {
    const colon = address.lastIndexOf(':');
    const host = address.slice(0, colon).replace(/^\[|\]$/g, '');
    const port = Number(address.slice(colon + 1));
    if (host !== '')
        return fastify.listen({ host, port });
    try {
        await fastify.listen({ host: '::', port });
    }
    catch (error) {
        const { code } = error;
        if (code !== 'EAFNOSUPPORT' && code !== 'EADDRNOTAVAIL')
            throw error;
        await fastify.listen({ host: '0.0.0.0', port });
    }
    const scheme = 'setSecureContext' in fastify.server ? 'https' : 'http';
    return `${scheme}://localhost:${fastify.server.address().port}`;
}
function sayDemo(log, { demoUrl }, url) {
    if (demoUrl === undefined)
        return;
    log.info('A backend of this configuration is the built-in demo. Try it:');
    log.info(`curl -N ${url}/v1/chat/completions -H 'content-type: application/json' ` +
        `-d '{"model": "demo", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'`);
}
/**
 * What is not even HTTP gets a short answer, in OpenAI's shape, and the connection is closed. Where
 * an answer is on its way already nothing may be written into it.
 */
function answerClientError(error, socket) {
    const running = socket._httpMessage;
    if (error.code === 'ECONNRESET' || !socket.writable || running?.headersSent) {
        socket.destroy();
        return;
    }
    const answer = error.code === 'HPE_HEADER_OVERFLOW'
        ? new GatewayError('headers_too_large', 'The headers of this request are too large.')
        : error.code === 'ERR_HTTP_REQUEST_TIMEOUT'
            ? new GatewayError('request_timeout', 'The request did not arrive in time.')
            : new GatewayError('invalid_request', 'This is not a valid HTTP request.');
    const body = JSON.stringify(openaiError(answer));
    socket.write(`HTTP/1.1 ${answer.statusCode} ${REASONS[answer.statusCode]}\r\n` +
        'content-type: application/json; charset=utf-8\r\n' +
        `content-length: ${Buffer.byteLength(body)}\r\nconnection: close\r\n\r\n${body}`);
    socket.destroySoon();
}
const REASONS = {
    400: 'Bad Request',
    408: 'Request Timeout',
    431: 'Request Header Fields Too Large'
};
