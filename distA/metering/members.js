const QUOTE = 0x22;
const BACKSLASH = 0x5c;
/**
 * Finds the members of a JSON object without parsing their values, so that one of them can be
 * changed and every other byte stays as it came. The text must be valid JSON.
 *
 * @param bytes JSON text in UTF-8
 * @param from where the object's `{` stands, or white space before it
 * @example
 * findMembers(Buffer.from('{"a": 1, "b": [2]}')) // [{ name: 'a', start: 6, end: 7 }, { name: 'b', start: 14, end: 17 }]
 */
export function findMembers(bytes, from = 0) {
    const members = [];
    let at = skipSpace(bytes, from) + 1;
    while (at < bytes.length) {
        at = skipSpace(bytes, at);
        if (bytes[at] !== QUOTE)
            break;
        const nameEnd = skipString(bytes, at);
        const name = JSON.parse(bytes.toString('utf8', at, nameEnd));
        const start = skipSpace(bytes, skipSpace(bytes, nameEnd) + 1);
        const end = skipValue(bytes, start);
        members.push({ name, start, end });
        at = skipSpace(bytes, end) + 1;
    }
    return members;
}
function skipValue(bytes, from) {
    let depth = 0;
    let at = from;
    while (at < bytes.length) {
        switch (bytes[at]) {
            case QUOTE:
                at = skipString(bytes, at);
                if (depth === 0)
                    return at;
                continue;
            case 0x7b:
            case 0x5b:
                depth++;
                break;
            case 0x7d:
            case 0x5d:
                if (depth === 0)
                    return trimEnd(bytes, at);
                depth--;
                if (depth === 0)
                    return at + 1;
                break;
            case 0x2c:
                if (depth === 0)
                    return trimEnd(bytes, at);
                break;
        }
        at++;
    }
    return at;
}
function skipString(bytes, from) {
    let at = from;
    for (;;) {
        at = bytes.indexOf(QUOTE, at + 1);
        if (at === -1)
            return bytes.length;
        let slashes = 0;
        while (bytes[at - 1 - slashes] === BACKSLASH)
            slashes++;
        if (slashes % 2 === 0)
            return at + 1;
    }
}
function skipSpace(bytes, from) {
    let at = from;
    while (isSpace(bytes[at]))
        at++;
    return at;
}
function trimEnd(bytes, end) {
    let at = end;
    while (isSpace(bytes[at - 1]))
        at--;
    return at;
}
function isSpace(byte) {
    return byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09;
}
