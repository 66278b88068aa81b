/**
 * A small OpenAI-compatible server with a canned answer, so that the gateway can be seen at work
 * where there is no inference server. It counts a word as a token and says so honestly in `usage`.
 */
export interface DemoBackend {
    url: string;
    close(): Promise<void>;
}
/**
 * Starts it on a free port of the loopback interface.
 *
 * @example
 * const demo = await startDemo()
 * await fetch(`${demo.url}/v1/models`)
 * await demo.close()
 */
export declare function startDemo(): Promise<DemoBackend>;
