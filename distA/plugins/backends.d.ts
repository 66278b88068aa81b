import type { FastifyPluginAsync } from 'fastify';
import { type Static, Type } from 'typebox';
import type { AttemptResult } from '../pool/attempt.ts';
import { Pool } from '../pool/pool.ts';
export declare const BackendsOptions: Type.TObject<{
    backends: Type.TArray<Type.TObject<{
        name: Type.TOptional<Type.TString>;
        url: Type.TString;
        weight: Type.TInteger;
        api_key: Type.TOptional<Type.TString>;
        headers: Type.TRecord<"^.*$", Type.TString>;
        timeout: Type.TOptional<Type.TUnsafe<number>>;
        connect_timeout: Type.TOptional<Type.TUnsafe<number>>;
        idle_timeout: Type.TOptional<Type.TUnsafe<number>>;
        max_idle_conns: Type.TOptional<Type.TUnsafe<unknown>>;
    }>>;
    routing: Type.TObject<{
        enabled: Type.TBoolean;
        load_balance: Type.TEnum<("latency_based" | "least_connections" | "random" | "round_robin" | "weighted")[]>;
        timeout: Type.TUnsafe<number>;
        connect_timeout: Type.TUnsafe<number>;
        idle_timeout: Type.TUnsafe<number>;
        retry: Type.TObject<{
            enabled: Type.TBoolean;
            max_retries: Type.TInteger;
            initial_wait: Type.TUnsafe<number>;
            max_wait: Type.TUnsafe<number>;
            multiplier: Type.TNumber;
            retry_on: Type.TArray<Type.TEnum<["connect_failure", "timeout", "5xx", "429"]>>;
        }>;
        fallback: Type.TOptional<Type.TUnsafe<unknown>>;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
    }>;
    health_check: Type.TObject<{
        enabled: Type.TBoolean;
        interval: Type.TUnsafe<number>;
        timeout: Type.TUnsafe<number>;
        method: Type.TEnum<["GET", "HEAD", "POST"]>;
        path: Type.TString;
        expected_status: Type.TInteger;
        unhealthy_threshold: Type.TInteger;
        healthy_threshold: Type.TInteger;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
    }>;
}>;
export type BackendsOptions = Static<typeof BackendsOptions>;
declare module 'fastify' {
    interface FastifyInstance {
        backends: Backends;
    }
}
/** The pool, how it is changed, and who wants to know of attempts. */
export interface Backends {
    readonly pool: Pool;
    readonly onAttempt: ((backend: string, result: AttemptResult) => void)[];
    update(options: BackendsOptions): Promise<void>;
    /** Base URL of the demo backend, when it is in use. */
    readonly demoUrl: string | undefined;
}
declare const _default: FastifyPluginAsync<{
    readonly backends?: readonly {
        readonly name?: string;
        readonly url?: string;
        readonly weight?: string | number;
        readonly api_key?: string;
        readonly headers?: {
            readonly [x: string]: string | undefined;
        };
        readonly timeout?: string | number;
        readonly connect_timeout?: string | number;
        readonly idle_timeout?: string | number;
        readonly max_idle_conns?: unknown;
    }[];
    readonly routing?: {
        readonly enabled?: boolean;
        readonly load_balance?: "latency_based" | "least_connections" | "random" | "round_robin" | "weighted";
        readonly timeout?: string | number;
        readonly connect_timeout?: string | number;
        readonly idle_timeout?: string | number;
        readonly retry?: {
            readonly enabled?: boolean;
            readonly max_retries?: string | number;
            readonly initial_wait?: string | number;
            readonly max_wait?: string | number;
            readonly multiplier?: string | number;
            readonly retry_on?: readonly ("429" | "5xx" | "connect_failure" | "timeout")[];
        };
        readonly fallback?: unknown;
        readonly script?: unknown;
    };
    readonly health_check?: {
        readonly enabled?: boolean;
        readonly interval?: string | number;
        readonly timeout?: string | number;
        readonly method?: "GET" | "HEAD" | "POST";
        readonly path?: string;
        readonly expected_status?: string | number;
        readonly unhealthy_threshold?: string | number;
        readonly healthy_threshold?: string | number;
        readonly script?: unknown;
    };
}>;
export default _default;
