import { Backend, type BackendConfig, type Live } from './backend.ts';
import { type StrategyName } from './strategies.ts';
/** When and how often another attempt is made. Times in milliseconds. */
export interface RetryPolicy {
    enabled: boolean;
    maxRetries: number;
    initialWait: number;
    maxWait: number;
    multiplier: number;
    retryOn: readonly FailureKind[];
}
/** How an attempt fails before the client has had a byte of an answer. */
export type FailureKind = 'connect_failure' | 'timeout' | '5xx' | '429';
export interface PoolConfig {
    backends: BackendConfig[];
    loadBalance: StrategyName;
    retry: RetryPolicy;
}
/**
 * The backends as one configuration has them, and how one of them is chosen. A request goes through
 * all its attempts with the lineup it began with.
 */
export declare class Lineup {
    #private;
    readonly backends: Backend[];
    readonly retry: RetryPolicy;
    /** Requests under way with it. */
    requests: number;
    constructor(backends: Backend[], { retry, loadBalance }: PoolConfig);
    /**
     * The backends that may be given work. `pinned` (a name) is the only one that can serve a call
     * about what it holds; if it has left any other may say so.
     */
    candidates(pinned?: string): Backend[];
    /** The backend for the next attempt, or undefined when none that may be used is available. */
    pick(exclude: readonly Backend[], pinned?: string): Backend | undefined;
}
/** All backends, over all changes of the configuration. */
export declare class Pool {
    #private;
    constructor(config: PoolConfig);
    /**
     * Takes over another configuration. A server that stays (same name and URL) keeps its connections,
     * its counts and what was learned; one that goes finishes its requests first.
     */
    update(config: PoolConfig): void;
    /** A request begins; it must {@link leave} the lineup when it is over. */
    enter(): Lineup;
    leave(lineup: Lineup): void;
    get backends(): Backend[];
    /** Names and state of all servers in use, those included that only finish their requests. */
    get all(): {
        name: string;
        live: Live;
    }[];
    get available(): boolean;
    destroy(): Promise<void>;
}
