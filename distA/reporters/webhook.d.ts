import type { FastifyBaseLogger } from 'fastify';
import { type Static, Type } from 'typebox';
import type { Reporter, UsageEvent } from './reporter.ts';
export declare const WebhookOptions: Type.TObject<{
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
}>;
export type WebhookOptions = Static<typeof WebhookOptions>;
/** What happened to an event. */
export type Delivery = 'delivered' | 'failed';
/**
 * Sends usage events to a service, each by itself or several together. Deliveries begin in order, a few run at a time, and what fails
 * is sent again with growing waits, or after the `Retry-After` of the answer. The queue is bounded; what does not fit
 * is lost and counted as failed.
 */
export declare class Webhook implements Reporter {
    #private;
    readonly name: string;
    constructor(name: string, options: WebhookOptions, onDelivery: (result: Delivery) => void, log: FastifyBaseLogger);
    get pending(): number;
    report(event: UsageEvent, body: Buffer | undefined): void;
    close(signal: AbortSignal): Promise<void>;
}
