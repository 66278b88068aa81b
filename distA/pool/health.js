import { setTimeout as sleep } from 'node:timers/promises';
import { request } from 'undici';
/**
 * Probes every backend at once and then every `interval`. A backend goes away after
 * `unhealthyThreshold` failures in a row and comes back after `healthyThreshold` successes; the very
 * first probe decides alone, so that a gateway does not begin by sending calls to a dead backend.
 */
export class HealthChecker {
    #log;
    #stop = new AbortController();
    constructor(log) {
        this.#log = log;
    }
    /** Begins anew with these backends; ones that are not checked any more count as healthy. */
    watch(backends, check) {
        this.stop();
        this.#stop = new AbortController();
        for (const backend of backends) {
            if (check.enabled)
                void this.#watch(backend, check, this.#stop.signal);
            else
                backend.live.healthy = true;
        }
    }
    stop() {
        this.#stop.abort();
    }
    async #watch(backend, check, signal) {
        const { live } = backend;
        let successes = 0;
        let failures = 0;
        while (!signal.aborted) {
            const failure = await probe(backend, check, signal);
            if (signal.aborted)
                return;
            successes = failure === undefined ? successes + 1 : 0;
            failures = failure === undefined ? 0 : failures + 1;
            if (live.healthy &&
                (failures >= check.unhealthyThreshold || (!live.isProbed && failures > 0))) {
                live.healthy = false;
                this.#log.warn({ backend: backend.name, reason: failure }, 'backend is unhealthy');
            }
            else if (!live.healthy &&
                (successes >= check.healthyThreshold || (!live.isProbed && successes > 0))) {
                live.healthy = true;
                this.#log.info({ backend: backend.name }, 'backend is healthy');
            }
            live.isProbed = true;
            await sleep(check.interval, undefined, { signal, ref: false }).catch(() => { });
        }
    }
}
/** What went wrong, or undefined. */
async function probe(backend, check, signal) {
    try {
        const { statusCode, body } = await request(backend.live.origin + backend.live.basePath + check.path, {
            method: check.method,
            headers: backend.config.headers,
            signal: AbortSignal.any([signal, AbortSignal.timeout(check.timeout)])
        });
        await body.dump();
        return statusCode === check.expectedStatus ? undefined : `status ${statusCode}`;
    }
    catch (error) {
        return error.code ?? error.message;
    }
}
