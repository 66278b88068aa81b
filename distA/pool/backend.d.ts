import type { Socket } from 'node:net';
import { type Dispatcher } from 'undici';
/** One inference server as it is configured. Times in milliseconds. */
export interface BackendConfig {
    name: string;
    /** Base URL; a trailing slash or `/v1` is no part of it. */
    url: string;
    weight: number;
    /** Sent with every request, over the client's own. */
    headers: Record<string, string>;
    /** Time to the head of the answer, to a connection, and between two chunks. */
    timeout: number;
    connectTimeout: number;
    idleTimeout: number;
}
/** Sees one request through; a connection that is being opened for it shows up in `socket`. */
export interface BackendHandler extends Dispatcher.DispatchHandler {
    socket: Socket | undefined;
}
/** One inference server: how it is configured, and what is known of it at the moment. */
export declare class Backend {
    readonly config: BackendConfig;
    readonly live: Live;
    /** `live`: of the same server under an earlier configuration. */
    constructor(config: BackendConfig, live?: Live);
    get name(): string;
    /** May it be given work? */
    get available(): boolean;
    /** Sends a request, over a connection of its own if it must be `fresh`. */
    dispatch(options: Dispatcher.DispatchOptions, handler: BackendHandler, fresh?: boolean): void;
}
/** Connections to a server, and what was learned of it: kept while its settings change. */
export declare class Live {
    #private;
    /** Exchanges whose answer has not ended; see {@link begin}. */
    inFlight: number;
    healthy: boolean;
    /** An active check has been made. */
    isProbed: boolean;
    /** Smooth weighted round robin keeps its place here. */
    currentWeight: number;
    readonly origin: string;
    readonly basePath: string;
    constructor({ url, connectTimeout }: Pick<BackendConfig, 'url' | 'connectTimeout'>);
    dispatch(options: Dispatcher.DispatchOptions, handler: BackendHandler, fresh: boolean): void;
    begin(): void;
    end(): void;
    /** It takes `stream_options.include_usage`, as far as is known. */
    get takesUsageQuestion(): boolean;
    refuseUsageQuestion(): void;
    /** A time to first byte in ms; a failure counts as a long one, so that failing fast attracts nothing. */
    observeLatency(ms: number, now: number): void;
    /**
     * Expected latency (ms), forgotten while nothing is observed, so that a slow one is tried again;
     * undefined before the first observation.
     */
    latency(now: number): number | undefined;
    /** Closes idle connections at once and busy ones when their answers have ended. */
    close(): Promise<void>;
    destroy(): Promise<void>;
}
