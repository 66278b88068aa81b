/** A member of a JSON object: its name and where its value stands in the bytes. */
export interface Member {
    name: string;
    /** First byte of the value and the byte after its last. */
    start: number;
    end: number;
}
/**
 * Finds the members of a JSON object without parsing their values, so that one of them can be
 * changed and every other byte stays as it came. The text must be valid JSON.
 *
 * @param bytes JSON text in UTF-8
 * @param from where the object's `{` stands, or white space before it
 * @example
 * findMembers(Buffer.from('{"a": 1, "b": [2]}')) // [{ name: 'a', start: 6, end: 7 }, { name: 'b', start: 14, end: 17 }]
 */
export declare function findMembers(bytes: Buffer, from?: number): Member[];
