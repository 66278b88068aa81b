import type { FastifyPluginAsync } from 'fastify';
import { type Static, Type } from 'typebox';
import { type Refusal } from '../limits/memory.ts';
export declare const LimitsOptions: Type.TObject<{
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
export type LimitsOptions = Static<typeof LimitsOptions>;
declare module 'fastify' {
    interface FastifyInstance {
        limits: {
            update(options: LimitsOptions): void;
            refusals: RefusalListener[];
        };
    }
}
type RefusalListener = (refusal: Refusal) => void;
/** A time as OpenAI writes it in its headers: `12ms`, `1.5s`, `6m0s`. */
export declare function goDuration(ms: number): string;
declare const _default: FastifyPluginAsync<{
    readonly enabled?: boolean;
    readonly storage?: "memory";
    readonly redis?: string;
    readonly script?: unknown;
    readonly global?: {
        readonly requests_per_second?: string | number;
        readonly requests_per_minute?: string | number;
        readonly burst_size?: string | number;
        readonly max_concurrent?: string | number;
        readonly tokens_per_minute?: unknown;
        readonly enabled?: boolean;
    };
    readonly per_key?: {
        readonly requests_per_second?: string | number;
        readonly requests_per_minute?: string | number;
        readonly burst_size?: string | number;
        readonly max_concurrent?: string | number;
        readonly tokens_per_minute?: unknown;
        readonly enabled?: boolean;
    };
}>;
export default _default;
