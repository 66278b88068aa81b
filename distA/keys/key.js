import { hash } from 'node:crypto';
import { BlockList, isIP } from 'node:net';
import { Type } from 'typebox';
import { GatewayError } from '../errors.js';
const StatusCode = (what, status, message, allow = false) => Type.Object({
    allow: Type.Boolean({ default: allow, description: 'Lets it pass' }),
    http_code: Type.Integer({
        minimum: 400,
        maximum: 599,
        default: status,
        description: 'Status of the answer'
    }),
    message: Type.String({ default: message, description: 'Text of the answer' })
}, { additionalProperties: false, default: {}, description: what });
/** `auth.status_codes`: what each status of a key answers. */
export const StatusCodes = Type.Object({
    active: StatusCode('An active key', 403, 'This API key may not be used.', true),
    disabled: StatusCode('A disabled key', 403, 'This API key has been disabled.'),
    expired: StatusCode('An expired key', 403, 'This API key has expired.'),
    quota_exceeded: StatusCode('A quota used up', 429, 'The quota of this API key is used up.'),
    not_found: StatusCode('An unknown key', 401, 'This API key is not valid.')
}, { additionalProperties: false, default: {}, description: 'What each status of a key answers' });
const CODES = {
    active: 'key_disabled',
    disabled: 'key_disabled',
    expired: 'key_expired',
    quota_exceeded: 'insufficient_quota',
    not_found: 'invalid_api_key'
};
/** The refusal of a key that has this status, or undefined when the status lets it pass. */
export function statusRefusal(status, codes) {
    if (codes[status].allow)
        return undefined;
    const answer = codes[status];
    const retry = status === 'quota_exceeded' ? { 'x-should-retry': 'false' } : {};
    const ask = answer.http_code === 401 ? { 'www-authenticate': 'Bearer' } : {};
    return new GatewayError(CODES[status], answer.message, {
        statusCode: answer.http_code,
        headers: { ...retry, ...ask }
    });
}
/**
 * Decides whether a key may be used now, from this address.
 *
 * @example
 * checkKey({ id: 'k', status: 'active', expiresAt: 0 }, { ip: '::1', now: 1, codes }) // GatewayError
 */
export function checkKey(record, { ip, now, codes }) {
    const refusal = statusRefusal(statusAt(record, now), codes);
    if (refusal !== undefined)
        return refusal;
    if (record.startsAt !== undefined && now < record.startsAt) {
        return new GatewayError('key_not_started', 'This API key is not valid yet.');
    }
    const denied = record.deniedIps !== undefined && contains(record.deniedIps, ip);
    const allowed = record.allowedIps === undefined || contains(record.allowedIps, ip);
    if (denied || !allowed) {
        return new GatewayError('ip_not_allowed', 'This API key may not be used from this address.');
    }
    return undefined;
}
function statusAt(record, now) {
    if (record.status !== 'active')
        return record.status;
    if (record.expiresAt !== undefined && now >= record.expiresAt)
        return 'expired';
    return record.quotaLeft !== undefined && record.quotaLeft <= 0 ? 'quota_exceeded' : 'active';
}
export function toCaller(record) {
    const { id, name, userId, models } = record;
    return {
        id,
        ...(name === undefined ? {} : { name }),
        ...(userId === undefined ? {} : { userId }),
        ...(models === undefined ? {} : { models })
    };
}
/** SHA-256 of a key as lower-case hexadecimal digits: the only form in which keys are kept. */
export function hashKey(key) {
    return hash('sha256', key);
}
/**
 * A key's status from text (`active`, `enabled`, `disabled` ...) or the number of the original
 * (0 active, 1 disabled, 2 quota exceeded, 3 expired).
 *
 * @returns undefined for anything else, which must not pass
 */
export function parseStatus(status) {
    switch (typeof status === 'string' ? status.toLowerCase() : status) {
        case 0:
        case '0':
        case 'active':
        case 'enabled':
            return 'active';
        case 1:
        case '1':
        case 'disabled':
            return 'disabled';
        case 2:
        case '2':
        case 'quota_exceeded':
            return 'quota_exceeded';
        case 3:
        case '3':
        case 'expired':
            return 'expired';
        default:
            return undefined;
    }
}
/** 2001-09-09 in Unix seconds. */
const LEAST_SECONDS = 1e9;
/**
 * A point in time as Unix milliseconds, from ISO 8601 text or Unix seconds (number or digits).
 *
 * @returns NaN for anything else
 */
export function parseTime(time) {
    if (time instanceof Date)
        return time.getTime();
    if (typeof time === 'string' && !/^\d+$/.test(time))
        return Date.parse(time);
    const seconds = typeof time === 'object' || typeof time === 'boolean' ? Number.NaN : Number(time);
    // 2099 is a year that was meant, not half an hour after the beginning of 1970.
    return seconds < LEAST_SECONDS ? Number.NaN : seconds * 1000;
}
/** Is this an address or a network (`10.0.0.0/8`, `2001:db8::/32`)? */
export function isNetwork(text) {
    if (typeof text !== 'string')
        return false;
    const [address, prefix, ...rest] = text.split('/');
    const family = isIP(address ?? '');
    if (family === 0 || rest.length > 0)
        return false;
    if (prefix === undefined)
        return true;
    return /^\d{1,3}$/.test(prefix) && Number(prefix) <= (family === 4 ? 32 : 128);
}
function contains(networks, ip) {
    const list = new BlockList();
    for (const network of networks) {
        const [address, prefix] = network.split('/');
        const family = isIP(address) === 6 ? 'ipv6' : 'ipv4';
        if (prefix === undefined)
            list.addAddress(address, family);
        else
            list.addSubnet(address, Number(prefix), family);
    }
    return list.check(ip, isIP(ip) === 6 ? 'ipv6' : 'ipv4');
}
/** Does one of the patterns (`*` stands for any text) name this model? */
export function matchesModel(patterns, model) {
    return patterns.some(pattern => {
        const [head, ...tails] = pattern.split('*');
        if (tails.length === 0)
            return model === pattern;
        if (!model.startsWith(head))
            return false;
        const last = tails.pop();
        let at = head.length;
        for (const tail of tails) {
            const found = model.indexOf(tail, at);
            if (found === -1)
                return false;
            at = found + tail.length;
        }
        return model.length - last.length >= at && model.endsWith(last);
    });
}
