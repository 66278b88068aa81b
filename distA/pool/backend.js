import { Readable } from 'node:stream';
import { buildConnector, Client, Pool as Sockets } from 'undici';
/** How fast old latencies are forgotten, and how much a new one counts. */
const FORGET_MS = 15_000;
const ALPHA = 0.3;
/** A server that refused a field is asked again after a while: it may have been upgraded. */
const REMEMBER_REFUSAL_MS = 10 * 60_000;
/** From so many connections on they are let go of when none is in use. */
const MANY_CONNECTIONS = 256;
/** One inference server: how it is configured, and what is known of it at the moment. */
export class Backend {
    config;
    live;
    /** `live`: of the same server under an earlier configuration. */
    constructor(config, live = new Live(config)) {
        this.config = config;
        this.live = live;
    }
    get name() {
        return this.config.name;
    }
    /** May it be given work? */
    get available() {
        return this.live.healthy;
    }
    /** Sends a request, over a connection of its own if it must be `fresh`. */
    dispatch(options, handler, fresh = false) {
        const { timeout, idleTimeout } = this.config;
        const limited = {
            ...options,
            path: this.live.basePath + options.path,
            headersTimeout: timeout,
            bodyTimeout: idleTimeout
        };
        this.live.dispatch(limited, handler, fresh);
    }
}
/** Connections to a server, and what was learned of it: kept while its settings change. */
export class Live {
    /** Exchanges whose answer has not ended; see {@link begin}. */
    inFlight = 0;
    healthy = true;
    /** An active check has been made. */
    isProbed = false;
    /** Smooth weighted round robin keeps its place here. */
    currentWeight = 0;
    origin;
    basePath;
    #settings;
    #sockets;
    /** Most requests at once over these connections. */
    #peak = 0;
    #opening;
    /** Handlers of streamed bodies: undici opens their connections in a microtask. */
    #openingLater = [];
    #questionRefusedAt = Number.NEGATIVE_INFINITY;
    #latency = 0;
    #latencyAt;
    constructor({ url, connectTimeout }) {
        const { origin, pathname } = new URL(url);
        this.origin = origin;
        this.basePath = pathname.replace(/\/+$/, '').replace(/\/v1$/, '');
        const connect = buildConnector({ timeout: connectTimeout, allowH2: false });
        // No cap on connections: admission is the limits' work, and undici's own queue can't be seen.
        this.#settings = {
            allowH2: false,
            connect: (options, done) => {
                const socket = connect(options, done);
                const handler = this.#opening ?? this.#openingLater.shift();
                if (handler !== undefined)
                    handler.socket = socket;
            }
        };
        this.#sockets = new Sockets(this.origin, this.#settings);
    }
    dispatch(options, handler, fresh) {
        const sockets = fresh ? new Client(this.origin, this.#settings) : this.#sockets;
        if (options.body instanceof Readable)
            this.#openLater(handler);
        else
            this.#opening = handler;
        try {
            sockets.dispatch(options, handler);
        }
        finally {
            this.#opening = undefined;
            if (fresh)
                void sockets.close();
        }
    }
    begin() {
        this.inFlight++;
        if (this.inFlight > this.#peak)
            this.#peak = this.inFlight;
    }
    end() {
        this.inFlight--;
        if (this.inFlight > 0 || this.#peak < MANY_CONNECTIONS)
            return;
        // undici keeps what it has made for each connection, also when that is closed.
        const used = this.#sockets;
        this.#sockets = new Sockets(this.origin, this.#settings);
        this.#peak = 0;
        void used.close();
    }
    /** It takes `stream_options.include_usage`, as far as is known. */
    get takesUsageQuestion() {
        return performance.now() - this.#questionRefusedAt > REMEMBER_REFUSAL_MS;
    }
    refuseUsageQuestion() {
        this.#questionRefusedAt = performance.now();
    }
    /** A time to first byte in ms; a failure counts as a long one, so that failing fast attracts nothing. */
    observeLatency(ms, now) {
        const before = this.latency(now);
        this.#latency = before === undefined ? ms : before * (1 - ALPHA) + ms * ALPHA;
        this.#latencyAt = now;
    }
    /**
     * Expected latency (ms), forgotten while nothing is observed, so that a slow one is tried again;
     * undefined before the first observation.
     */
    latency(now) {
        if (this.#latencyAt === undefined)
            return undefined;
        return this.#latency * Math.exp(-(now - this.#latencyAt) / FORGET_MS);
    }
    /** Closes idle connections at once and busy ones when their answers have ended. */
    async close() {
        await this.#sockets.close();
    }
    async destroy() {
        await this.#sockets.destroy();
    }
    #openLater(handler) {
        this.#openingLater.push(handler);
        setImmediate(() => {
            const at = this.#openingLater.indexOf(handler);
            if (at !== -1)
                this.#openingLater.splice(at, 1);
        });
    }
}
