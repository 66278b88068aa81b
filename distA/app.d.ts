import type { Registry } from '@prometheus-io/client';
import type { FastifyPluginAsync, FastifyReply, FastifyRequest } from 'fastify';
import { type Static, Type } from 'typebox';
import { type Exchanges } from './exchange.ts';
import { type Given } from './options.ts';
import type { Peers } from './peers.ts';
import { type GivenAuthOptions } from './plugins/auth.ts';
/** What the gateway can be told, in a file and in code alike. */
export declare const GatewayOptions: Type.TObject<{
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
    auth: Type.TObject<{
        enabled: Type.TBoolean;
        mode: Type.TEnum<["first_match", "all"]>;
        header_names: Type.TArray<Type.TString>;
        skip_paths: Type.TArray<Type.TString>;
        status_codes: Type.TObject<{
            active: Type.TObject<{
                allow: Type.TBoolean;
                http_code: Type.TInteger;
                message: Type.TString;
            }>;
            disabled: Type.TObject<{
                allow: Type.TBoolean;
                http_code: Type.TInteger;
                message: Type.TString;
            }>;
            expired: Type.TObject<{
                allow: Type.TBoolean;
                http_code: Type.TInteger;
                message: Type.TString;
            }>;
            quota_exceeded: Type.TObject<{
                allow: Type.TBoolean;
                http_code: Type.TInteger;
                message: Type.TString;
            }>;
            not_found: Type.TObject<{
                allow: Type.TBoolean;
                http_code: Type.TInteger;
                message: Type.TString;
            }>;
        }>;
        keys: Type.TArray<Type.TObject<{
            key: Type.TString;
            name: Type.TOptional<Type.TString>;
            user_id: Type.TOptional<Type.TString>;
            status: Type.TOptional<Type.TUnsafe<string | number>>;
            starts_at: Type.TOptional<Type.TUnsafe<string | number>>;
            expires_at: Type.TOptional<Type.TUnsafe<string | number>>;
            allowed_ips: Type.TOptional<Type.TArray<Type.TString>>;
            denied_ips: Type.TOptional<Type.TArray<Type.TString>>;
            models: Type.TOptional<Type.TArray<Type.TString>>;
            total_quota: Type.TOptional<Type.TUnsafe<unknown>>;
            used_quota: Type.TOptional<Type.TUnsafe<unknown>>;
            quota_reset_period: Type.TOptional<Type.TEnum<["never", "daily", "weekly", "monthly"]>>;
            last_reset_at: Type.TOptional<Type.TUnsafe<string | number>>;
            created_at: Type.TOptional<Type.TUnsafe<string | number>>;
            updated_at: Type.TOptional<Type.TUnsafe<string | number>>;
        }>>;
        pipeline: Type.TArray<Type.TObject<{
            name: Type.TOptional<Type.TString>;
            type: Type.TEnum<["static", "webhook"]>;
            enabled: Type.TBoolean;
            static: Type.TOptional<Type.TObject<{
                keys: Type.TArray<Type.TObject<{
                    key: Type.TString;
                    name: Type.TOptional<Type.TString>;
                    user_id: Type.TOptional<Type.TString>;
                    status: Type.TOptional<Type.TUnsafe<string | number>>;
                    starts_at: Type.TOptional<Type.TUnsafe<string | number>>;
                    expires_at: Type.TOptional<Type.TUnsafe<string | number>>;
                    allowed_ips: Type.TOptional<Type.TArray<Type.TString>>;
                    denied_ips: Type.TOptional<Type.TArray<Type.TString>>;
                    models: Type.TOptional<Type.TArray<Type.TString>>;
                    total_quota: Type.TOptional<Type.TUnsafe<unknown>>;
                    used_quota: Type.TOptional<Type.TUnsafe<unknown>>;
                    quota_reset_period: Type.TOptional<Type.TEnum<["never", "daily", "weekly", "monthly"]>>;
                    last_reset_at: Type.TOptional<Type.TUnsafe<string | number>>;
                    created_at: Type.TOptional<Type.TUnsafe<string | number>>;
                    updated_at: Type.TOptional<Type.TUnsafe<string | number>>;
                }>>;
            }>>;
            webhook: Type.TOptional<Type.TObject<{
                url: Type.TString;
                method: Type.TEnum<["POST", "PUT"]>;
                timeout: Type.TUnsafe<number>;
                headers: Type.TRecord<"^.*$", Type.TString>;
            }>>;
            lua: Type.TOptional<Type.TUnsafe<unknown>>;
            script: Type.TOptional<Type.TUnsafe<unknown>>;
            redis: Type.TOptional<Type.TUnsafe<unknown>>;
            database: Type.TOptional<Type.TUnsafe<unknown>>;
        }>>;
    }>;
    rate_limit: Type.TObject<{
        enabled: Type.TBoolean;
        storage: Type.TEnum<["memory"]>;
        redis: Type.TOptional<Type.TString>;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
        global: Type.TObject<{
            requests_per_second: Type.TInteger;
            requests_per_minute: Type.TInteger;
            burst_size: Type.TInteger;
            max_concurrent: Type.TInteger;
            tokens_per_minute: Type.TOptional<Type.TUnsafe<unknown>>;
            enabled: Type.TBoolean;
        }>;
        per_key: Type.TObject<{
            requests_per_second: Type.TInteger;
            requests_per_minute: Type.TInteger;
            burst_size: Type.TInteger;
            max_concurrent: Type.TInteger;
            tokens_per_minute: Type.TOptional<Type.TUnsafe<unknown>>;
            enabled: Type.TBoolean;
        }>;
    }>;
    usage: Type.TObject<{
        enabled: Type.TBoolean;
        reporters: Type.TArray<Type.TObject<{
            name: Type.TOptional<Type.TString>;
            type: Type.TEnum<["webhook"]>;
            enabled: Type.TBoolean;
            webhook: Type.TOptional<Type.TObject<{
                url: Type.TString;
                method: Type.TEnum<["POST", "PUT"]>;
                timeout: Type.TUnsafe<number>;
                retry: Type.TInteger;
                headers: Type.TRecord<"^.*$", Type.TString>;
                batch: Type.TObject<{
                    max_events: Type.TInteger;
                    max_wait: Type.TUnsafe<number>;
                }>;
                include_request_body: Type.TBoolean;
            }>>;
            database: Type.TOptional<Type.TUnsafe<unknown>>;
            builtin: Type.TOptional<Type.TUnsafe<unknown>>;
            script: Type.TOptional<Type.TUnsafe<unknown>>;
        }>>;
    }>;
    metrics: Type.TObject<{
        enabled: Type.TBoolean;
        path: Type.TString;
        latency_buckets: Type.TArray<Type.TNumber>;
        custom_labels: Type.TOptional<Type.TUnsafe<unknown>>;
    }>;
    proxy: Type.TOptional<Type.TObject<{
        write_timeout: Type.TUnsafe<number>;
    }>>;
    drain_timeout: Type.TOptional<Type.TUnsafe<number>>;
}>;
export type GatewayOptions = Static<typeof GatewayOptions>;
/** What can be done to a running gateway. */
export interface Gateway {
    /** Takes over other options; running exchanges keep the ones they began with. */
    reload(options: GatewayOptions): Promise<void>;
    /** Base URL of the demo backend, when it is in use. */
    readonly demoUrl: string | undefined;
    readonly exchanges: Exchanges;
    readonly metricsRegistry: Registry;
}
/** The gateway's options as they may be given in code. */
export type GivenOptions = Given<Omit<GatewayOptions, 'auth'>> & {
    auth?: GivenAuthOptions;
    onGateway?: (gateway: Gateway) => void;
    /** Answer every unknown path of the server, not only those under the prefix. */
    ownsNotFound?: boolean;
    /** Where several processes serve together. */
    peers?: Peers;
};
interface Lifecycle {
    isDraining: boolean;
}
declare module 'fastify' {
    interface FastifyInstance {
        lifecycle: Lifecycle;
    }
}
/**
 * The whole gateway as one plugin. It keeps its hooks, decorators, errors and routes in its own
 * scope, under the prefix it is registered with.
 *
 * @example
 * import Fastify from 'fastify'
 * import gateway from 'llmproxy'
 *
 * const fastify = Fastify()
 * await fastify.register(gateway, { prefix: '/llm', backends: [{ url: 'http://127.0.0.1:8001' }] })
 */
declare const gateway: FastifyPluginAsync<GivenOptions>;
/** Answers an error in the dialect of its route. */
export declare function answerError(error: unknown, request: FastifyRequest, reply: FastifyReply): void;
export default gateway;
