import { Registry } from '@prometheus-io/client';
import type { FastifyPluginAsync } from 'fastify';
import { type Static, Type } from 'typebox';
export declare const MetricsOptions: Type.TObject<{
    enabled: Type.TBoolean;
    path: Type.TString;
    latency_buckets: Type.TArray<Type.TNumber>;
    custom_labels: Type.TOptional<Type.TUnsafe<unknown>>;
}>;
export type MetricsOptions = Static<typeof MetricsOptions>;
declare module 'fastify' {
    interface FastifyInstance {
        metricsRegistry: Registry;
    }
}
declare const _default: FastifyPluginAsync<{
    readonly enabled?: boolean;
    readonly path?: string;
    readonly latency_buckets?: readonly (string | number)[];
    readonly custom_labels?: unknown;
}>;
export default _default;
