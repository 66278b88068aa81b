import type { FastifyBaseLogger } from 'fastify';
import type { Backend } from './backend.ts';
/** Active health checks. Times in milliseconds. */
export interface HealthCheck {
    enabled: boolean;
    interval: number;
    timeout: number;
    method: 'GET' | 'HEAD' | 'POST';
    path: string;
    expectedStatus: number;
    unhealthyThreshold: number;
    healthyThreshold: number;
}
/**
 * Probes every backend at once and then every `interval`. A backend goes away after
 * `unhealthyThreshold` failures in a row and comes back after `healthyThreshold` successes; the very
 * first probe decides alone, so that a gateway does not begin by sending calls to a dead backend.
 */
export declare class HealthChecker {
    #private;
    constructor(log: FastifyBaseLogger);
    /** Begins anew with these backends; ones that are not checked any more count as healthy. */
    watch(backends: Backend[], check: HealthCheck): void;
    stop(): void;
}
