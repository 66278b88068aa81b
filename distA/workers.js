import cluster, {} from 'node:cluster';
import { once } from 'node:events';
import { availableParallelism } from 'node:os';
import { AggregatorRegistry } from '@prometheus-io/client';
import closeWithGrace from 'close-with-grace';
import { collectGarbage, createLog, LISTENING, startServer } from './server.js';
import { VERSION } from './version.js';
/** A worker that crashes as soon as it has begun is replaced after growing waits (ms). */
const FIRST_WAIT = 100;
const MAX_WAIT = 30_000;
const STABLE_AFTER = 10_000;
const RELOAD_TIMEOUT = 10_000;
/** The primary has little to do once its workers serve (ms). */
const TIDY_AFTER = 2_000;
/** How many processes the configuration asks for. */
export function workerCount({ server }) {
    return server.workers === 'auto' ? availableParallelism() : server.workers;
}
/** Starts the workers; this process is their primary from now on. */
export async function startWorkers(started, dataDir) {
    let config = started;
    let isClosing = false;
    let wait = FIRST_WAIT;
    const log = createLog(config.log, dataDir);
    const all = new AggregatorRegistry();
    cluster.setupPrimary({ args: [] });
    const urls = await Promise.all(Array.from({ length: workerCount(config) }, start)).catch(error => {
        isClosing = true;
        for (const worker of workers())
            worker.process.kill('SIGKILL');
        throw error;
    });
    const url = urls[0];
    log.info({ version: VERSION, node: process.version, url, workers: urls.length }, LISTENING);
    setTimeout(collectGarbage, TIDY_AFTER).unref();
    /** Starts a worker, and resolves with its URL when it serves. */
    function start() {
        const worker = cluster.fork();
        const startedAt = performance.now();
        return new Promise((resolve, reject) => {
            worker.on('message', (message) => {
                if (message.kind === 'serves')
                    resolve(message.url);
                else if (message.kind === 'failed') {
                    reject(Object.assign(new Error(message.message), { code: message.code }));
                }
                else if (message.kind === 'news')
                    tellOthers(worker, message.news);
                else if (message.kind === 'scraped')
                    void answerScrape(worker, message.id);
            });
            worker.once('exit', (code, signal) => {
                reject(new Error('a worker has stopped while it was starting'));
                if (isClosing)
                    return;
                if (performance.now() - startedAt > STABLE_AFTER)
                    wait = FIRST_WAIT;
                log.error({ pid: worker.process.pid, code, signal, wait }, 'a worker has stopped');
                setTimeout(replace, wait);
                wait = Math.min(wait * 2, MAX_WAIT);
            });
            send(worker, { kind: 'serve', config });
        });
    }
    function replace() {
        if (isClosing)
            return;
        // One that fails exits, and is replaced in its turn.
        start().then(() => log.info('a worker has been replaced'), error => log.error({ err: error }, 'a worker could not be started'));
    }
    function tellOthers(teller, news) {
        for (const worker of workers())
            if (worker !== teller)
                send(worker, { kind: 'news', news });
    }
    async function answerScrape(worker, id) {
        try {
            send(worker, { kind: 'metrics', id, text: await all.clusterMetrics() });
        }
        catch (error) {
            send(worker, { kind: 'metrics', id, error: error.message });
        }
    }
    return {
        url,
        log,
        async reload(changed) {
            config = changed;
            log.level = changed.log.level;
            await Promise.all(workers().map(async (worker) => {
                send(worker, { kind: 'reload', config });
                const error = await reloaded(worker);
                if (error !== undefined)
                    throw new Error(`worker ${worker.process.pid}: ${error}`);
            }));
        },
        async close() {
            isClosing = true;
            log.info('shutting down');
            await Promise.all(workers().map(async (worker) => {
                send(worker, { kind: 'close' });
                await once(worker, 'exit');
            }));
            log.info('stopped');
        }
    };
}
function workers() {
    return Object.values(cluster.workers ?? {}).filter(worker => worker !== undefined);
}
function send(worker, order) {
    // One that is about to stop needs no more orders.
    if (worker.isConnected())
        worker.send(order, () => { });
}
/** Resolves when a worker has taken over a configuration, or with what went wrong. */
function reloaded(worker) {
    return new Promise(resolve => {
        const timer = setTimeout(() => done('does not answer'), RELOAD_TIMEOUT);
        const listen = (message) => {
            if (message.kind === 'reloaded')
                done(message.error);
        };
        const stopped = () => done(undefined);
        const done = (error) => {
            clearTimeout(timer);
            worker.off('message', listen);
            worker.off('exit', stopped);
            resolve(error);
        };
        worker.on('message', listen);
        worker.once('exit', stopped);
    });
}
/** The life of a worker: it does as the primary says. */
export function runWorker(dataDir) {
    const scrapes = new Map();
    const newsListeners = [];
    let lastScrape = 0;
    let server;
    const peers = {
        async metrics() {
            const id = ++lastScrape;
            tell({ kind: 'scraped', id });
            const { text, error } = await new Promise(resolve => {
                scrapes.set(id, resolve);
            });
            if (text === undefined)
                throw new Error(error);
            return text;
        },
        tell: news => tell({ kind: 'news', news }),
        onNews: listener => newsListeners.push(listener)
    };
    process.on('message', async (order) => {
        if (order.kind === 'serve')
            await serve(order.config);
        else if (order.kind === 'reload')
            await reload(order.config);
        else if (order.kind === 'news')
            for (const listener of newsListeners)
                listener(order.news);
        else if (order.kind === 'metrics') {
            scrapes.get(order.id)?.(order);
            scrapes.delete(order.id);
        }
        else if (order.kind === 'close') {
            await server?.close();
            process.exit();
        }
    });
    async function serve(config) {
        try {
            const started = await startServer(config, dataDir, peers);
            server = started;
            AggregatorRegistry.setRegistries(started.gateway.metricsRegistry);
            new AggregatorRegistry();
            // Signals are the primary's: a terminal sends them to the whole group.
            closeWithGrace({ delay: false, logger: started.log, skip: [...SIGNALS] }, async ({ err }) => {
                started.log.fatal({ err }, 'unexpected error');
                await started.close();
            });
            for (const signal of SIGNALS)
                process.on(signal, () => { });
            tell({ kind: 'serves', url: started.url });
        }
        catch (error) {
            const { message, code } = error;
            process.send({ kind: 'failed', message, code }, () => process.exit(1));
        }
    }
    async function reload(config) {
        try {
            await server?.reload(config);
            tell({ kind: 'reloaded' });
        }
        catch (error) {
            tell({ kind: 'reloaded', error: error.message });
        }
    }
}
const SIGNALS = ['SIGHUP', 'SIGINT', 'SIGQUIT', 'SIGTERM'];
function tell(message) {
    if (process.connected)
        process.send(message);
}
