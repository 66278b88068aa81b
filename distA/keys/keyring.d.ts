import type { FastifyBaseLogger } from 'fastify';
import type { Caller } from '../exchange.ts';
import { type KeySource, type StatusCodes } from './key.ts';
export interface KeyringOptions {
    /** `first_match`: the first source that knows the key decides; `all`: every source must admit. */
    mode: 'first_match' | 'all';
    codes: StatusCodes;
    sources: KeySource[];
}
/**
 * Turns a presented key into its caller.
 *
 * @example
 * const keyring = new Keyring({ mode: 'first_match', codes, sources }, log)
 * await keyring.caller('sk-alice', '10.0.0.1') // { id: 'alice', ... }
 */
export declare class Keyring {
    #private;
    constructor(options: KeyringOptions, log: FastifyBaseLogger);
    /** @throws {GatewayError} 401 unknown, 403 refused, 429 quota, 503 when a source can't tell */
    caller(key: string, ip: string): Promise<Caller>;
}
