import type { Backend } from './backend.ts';
/** Chooses one of the candidates, of which there is at least one. `now`: a monotonic clock in ms. */
export type Strategy = (candidates: Backend[], now: number) => Backend;
export declare const strategies: {
    round_robin: Strategy;
    weighted: Strategy;
    least_connections: Strategy;
    latency_based: Strategy;
    random: Strategy;
};
export type StrategyName = keyof typeof strategies;
