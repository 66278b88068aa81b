import { type Static, Type } from 'typebox';
import { GatewayError } from '../errors.ts';
import { type KeyRecord, type KeySource, type StatusCodes } from './key.ts';
export declare const WebhookKeysOptions: Type.TObject<{
    url: Type.TString;
    method: Type.TEnum<["POST", "PUT"]>;
    timeout: Type.TUnsafe<number>;
    headers: Type.TRecord<"^.*$", Type.TString>;
}>;
export type WebhookKeysOptions = Static<typeof WebhookKeysOptions>;
/**
 * Asks a service about a key: `{"api_key": "...", "timestamp": 1767225600}`. It answers 2xx with a
 * JSON object (`status`, `user_id`, `name`, `starts_at`, `expires_at`, `allowed_ips`, `denied_ips`,
 * `models`, `total_quota` and `used_quota`, `balance`; all may be missing), or refuses: 401 and 404
 * unknown, 403 disabled, 402 and 429 quota used up. A `code` other than 0 or 200 refuses too.
 */
export declare class WebhookKeys implements KeySource {
    #private;
    readonly name: string;
    constructor(name: string, options: WebhookKeysOptions, codes: StatusCodes);
    lookup(key: string, hash: string): Promise<KeyRecord | GatewayError | undefined>;
}
