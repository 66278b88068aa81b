import { isAlias, isMap, isScalar, isSeq, LineCounter, parseDocument } from 'yaml';
import { formatPath } from './issues.js';
/**
 * Reads YAML with `${NAME}` and `${NAME:-default}` in its values.
 *
 * @example
 * readYaml('a: ${A:-1}', 'file.yaml', {}).root // { a: '1' }
 */
export function readYaml(text, name, env) {
    const lines = new LineCounter();
    const document = parseDocument(text, { lineCounter: lines, prettyErrors: false });
    const reading = { document, env, issues: [], fromEnv: new Set(), open: new Set() };
    const place = (offset) => {
        const { line, col } = lines.linePos(offset);
        return `${name}:${line}:${col}`;
    };
    const errors = [...document.errors, ...document.warnings].map(({ pos, message }) => `${place(pos[0])} ${message}`);
    if (errors.length === 0) {
        try {
            // Follows every alias once, and finds those that lead nowhere, in circles or to too much.
            document.toJS({ maxAliasCount: 100 });
        }
        catch (error) {
            errors.push(`${name}:1:1 ${error.message}`);
        }
    }
    const root = errors.length > 0 ? undefined : toPlain(document.contents, [], reading);
    return {
        root: root ?? {},
        errors,
        issues: reading.issues,
        fromEnv: reading.fromEnv,
        complaints: () => reading.issues
            .map(issue => ({ ...issue, offset: offsetOf(document.contents, issue.path) }))
            .sort((a, b) => a.offset - b.offset)
            .map(({ path, message, offset }) => {
            // What came from the environment may be a secret.
            const shown = reading.fromEnv.has(formatPath(path))
                ? message.replace(/ \(got .*\)$/s, ' (got the value of an environment variable)')
                : message;
            return `${place(offset)} ${formatPath(path)} ${shown}`;
        })
    };
}
/** The document as plain values, with the environment put in. Members without a value are left out. */
function toPlain(node, path, reading) {
    if (isAlias(node)) {
        const target = node.resolve(reading.document);
        if (!reading.open.has(target))
            return toPlain(target, path, reading);
        reading.issues.push({ path, message: 'refers to itself' });
        return undefined;
    }
    reading.open.add(node);
    const plain = plainValue(node, path, reading);
    reading.open.delete(node);
    return plain;
}
function plainValue(node, path, reading) {
    if (isSeq(node)) {
        return node.items.map((item, at) => toPlain(item, [...path, at], reading));
    }
    if (isMap(node)) {
        const merged = {};
        const own = {};
        for (const { key, value } of node.items) {
            const name = String(isScalar(key) ? key.value : key);
            const isMerge = name === '<<';
            const plain = toPlain(value, isMerge ? path : [...path, name], reading);
            if (isMerge)
                Object.assign(merged, ...[plain].flat().reverse());
            else if (plain !== null && plain !== undefined)
                own[name] = plain;
        }
        return { ...merged, ...own };
    }
    if (!isScalar(node))
        return undefined;
    if (typeof node.value === 'object' && node.value !== null) {
        reading.issues.push({ path, message: 'must be plain text, a number or a truth value' });
        return undefined;
    }
    if (typeof node.value !== 'string' || !node.value.includes('${'))
        return node.value;
    const wrong = [];
    const filled = substitute(node.value, reading.env, wrong);
    if (wrong.length > 0) {
        reading.issues.push({ path, message: wrong.join(', ') });
        return undefined;
    }
    reading.fromEnv.add(formatPath(path));
    return filled;
}
const VARIABLE = /\$\$\{|\$\{(?:([A-Za-z_]\w*)(?::-([^}]*))?\})?/g;
/**
 * Puts the environment into a text: `${NAME}`, `${NAME:-default}`; `$${` stands for `${`.
 * A variable that is empty takes the default, as in a shell; white space around a value, such as the
 * line end of a secret's file, is no part of it.
 *
 * @param wrong what is wrong with it is added here
 */
export function substitute(value, env, wrong) {
    return value.replace(VARIABLE, (whole, name, fallback) => {
        if (whole === '$${')
            return '${';
        if (name === undefined) {
            wrong.push('holds a "${" that is not "${NAME}" or "${NAME:-default}"; write "$${" for the text');
            return '';
        }
        const found = env[name]?.trim();
        if (found !== undefined && (found !== '' || fallback === undefined))
            return found;
        if (fallback === undefined) {
            wrong.push(`needs the environment variable \${${name}}, which is not set`);
        }
        return fallback ?? '';
    });
}
/** Where in the file a path stands: at its name, or as near to it as the file goes. */
function offsetOf(node, path) {
    let offset = node?.range?.[0] ?? 0;
    let at = node;
    for (const part of path) {
        if (isMap(at)) {
            const pair = at.items.find(({ key }) => String(isScalar(key) ? key.value : key) === String(part));
            if (pair === undefined)
                return offset;
            offset = pair.key.range?.[0] ?? offset;
            at = pair.value;
        }
        else if (isSeq(at)) {
            at = at.items[Number(part)];
            offset = at?.range?.[0] ?? offset;
        }
        else
            return offset;
    }
    return offset;
}
