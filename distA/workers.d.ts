import type { Config } from './config.ts';
import { type Server } from './server.ts';
/** How many processes the configuration asks for. */
export declare function workerCount({ server }: Config): number;
/** Starts the workers; this process is their primary from now on. */
export declare function startWorkers(started: Config, dataDir: string): Promise<Server>;
/** The life of a worker: it does as the primary says. */
export declare function runWorker(dataDir: string): void;
