/** Parts of the original's dialect that this version doesn't have: fine while they are switched off. */
/** Does a part that isn't built ask for anything? `enabled: false`, `no`, 0, "", [] and {} don't. */
export declare function isSwitchedOn(value: unknown): boolean;
export interface SchemaNode {
    notBuilt?: true;
    later?: readonly string[];
    items?: SchemaNode;
    properties?: Record<string, SchemaNode>;
}
/**
 * Inside of what is switched off, parts that this version doesn't have are as good as not there:
 * they are taken out, so that a whole configuration of the dialect can be kept.
 */
export declare function dropSwitchedOff(schema: SchemaNode, value: unknown, isOff: boolean): void;
