import { type Issue } from './issues.ts';
/** A YAML file as plain values, and the places of all of them. */
export interface YamlFile {
    root: unknown;
    /** The text is not YAML: a line for each error. Nothing else can be said then. */
    errors: string[];
    /** What was found so far; whoever checks the values adds to it. */
    issues: Issue[];
    /** Paths whose values came from the environment. */
    fromEnv: Set<string>;
    /** The issues, each with file, line and column, in the order of the file. */
    complaints(): string[];
}
/**
 * Reads YAML with `${NAME}` and `${NAME:-default}` in its values.
 *
 * @example
 * readYaml('a: ${A:-1}', 'file.yaml', {}).root // { a: '1' }
 */
export declare function readYaml(text: string, name: string, env: NodeJS.ProcessEnv): YamlFile;
/**
 * Puts the environment into a text: `${NAME}`, `${NAME:-default}`; `$${` stands for `${`.
 * A variable that is empty takes the default, as in a shell; white space around a value, such as the
 * line end of a secret's file, is no part of it.
 *
 * @param wrong what is wrong with it is added here
 */
export declare function substitute(value: string, env: NodeJS.ProcessEnv, wrong: string[]): string;
