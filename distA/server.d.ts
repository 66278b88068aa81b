import Fastify, { type FastifyBaseLogger, type FastifyInstance } from 'fastify';
import { type Gateway } from './app.ts';
import { type Config } from './config.ts';
import type { Peers } from './peers.ts';
/** What serves: this process, or workers that it looks after. */
export interface Server {
    readonly url: string;
    readonly log: FastifyBaseLogger;
    /** Takes over another configuration; running exchanges keep the one they began with. */
    reload(config: Config): Promise<void>;
    /** Lets running answers finish, then stops. */
    close(): Promise<void>;
}
/** The line that tells that calls can be made. */
export declare const LISTENING = "LLMProxy is listening";
/** Serves in this process. `peers`: the other workers, if it is one of several. */
export declare function startServer(started: Config, dataDir: string, peers?: Peers): Promise<Server & {
    gateway: Gateway;
}>;
/**
 * Reads the file again when it changes, and when `reload` is called; a broken one is refused and the
 * last good one stays.
 */
export declare function followFile(file: string, running: Config, server: Server): {
    reload: () => Promise<void>;
    stop: () => void;
};
/** Everything that is not in use goes back to the operating system. */
export declare function collectGarbage(): void;
/** The gateway in a Fastify server of its own, as the configuration has it, not listening yet. */
export declare function createApp(config: Config, log: FastifyBaseLogger, peers?: Peers): Promise<{
    fastify: FastifyInstance<Fastify.RawServerDefault, import("node:http").IncomingMessage, import("node:http").ServerResponse<import("node:http").IncomingMessage>, FastifyBaseLogger, Fastify.FastifyTypeProviderDefault>;
    control: Gateway;
}>;
export declare function createLog(options: Config['log'], dataDir: string): FastifyBaseLogger;
