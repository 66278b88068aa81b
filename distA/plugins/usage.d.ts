import type { FastifyPluginAsync } from 'fastify';
import { type Static, Type } from 'typebox';
import type { Reporter } from '../reporters/reporter.ts';
import { type Delivery } from '../reporters/webhook.ts';
export declare const UsageOptions: Type.TObject<{
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
export type UsageOptions = Static<typeof UsageOptions>;
declare module 'fastify' {
    interface FastifyInstance {
        usage: UsageReports;
    }
}
export interface UsageReports {
    readonly reporters: readonly Reporter[];
    readonly onDelivery: ((result: Delivery) => void)[];
    update(options: UsageOptions): void;
    /** Delivers what is pending until the signal fires. */
    flush(signal: AbortSignal): Promise<void>;
}
declare const _default: FastifyPluginAsync<{
    readonly enabled?: boolean;
    readonly reporters?: readonly {
        readonly name?: string;
        readonly type?: "webhook";
        readonly enabled?: boolean;
        readonly webhook?: {
            readonly url?: string;
            readonly method?: "POST" | "PUT";
            readonly timeout?: string | number;
            readonly retry?: string | number;
            readonly headers?: {
                readonly [x: string]: string | undefined;
            };
            readonly batch?: {
                readonly max_events?: string | number;
                readonly max_wait?: string | number;
            };
            readonly include_request_body?: boolean;
        };
        readonly database?: unknown;
        readonly builtin?: unknown;
        readonly script?: unknown;
    }[];
}>;
export default _default;
