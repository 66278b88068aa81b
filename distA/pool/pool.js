import { isDeepStrictEqual } from 'node:util';
import { Backend } from './backend.js';
import { strategies } from './strategies.js';
/**
 * The backends as one configuration has them, and how one of them is chosen. A request goes through
 * all its attempts with the lineup it began with.
 */
export class Lineup {
    backends;
    retry;
    /** Requests under way with it. */
    requests = 0;
    #strategy;
    constructor(backends, { retry, loadBalance }) {
        this.backends = backends;
        this.retry = retry;
        this.#strategy = strategies[loadBalance];
    }
    /**
     * The backends that may be given work. `pinned` (a name) is the only one that can serve a call
     * about what it holds; if it has left any other may say so.
     */
    candidates(pinned) {
        const holder = pinned && this.backends.find(each => each.name === pinned);
        return (holder ? [holder] : this.backends).filter(each => each.available);
    }
    /** The backend for the next attempt, or undefined when none that may be used is available. */
    pick(exclude, pinned) {
        const candidates = this.candidates(pinned).filter(each => !exclude.includes(each));
        return candidates.length < 2 ? candidates[0] : this.#strategy(candidates, performance.now());
    }
}
/** All backends, over all changes of the configuration. */
export class Pool {
    #current;
    /** Lineups that are in use; the current one is the last. */
    #lineups = new Set();
    #closing = new Set();
    constructor(config) {
        this.#current = new Lineup(config.backends.map(each => new Backend(each)), config);
        this.#lineups.add(this.#current);
    }
    /**
     * Takes over another configuration. A server that stays (same name and URL) keeps its connections,
     * its counts and what was learned; one that goes finishes its requests first.
     */
    update(config) {
        const before = this.#current;
        const backends = config.backends.map(each => {
            const same = before.backends.find(backend => isSame(backend.config, each));
            if (same === undefined)
                return new Backend(each);
            return isDeepStrictEqual(same.config, each) ? same : new Backend(each, same.live);
        });
        this.#current = new Lineup(backends, config);
        this.#lineups.add(this.#current);
        this.#retire(before);
    }
    /** A request begins; it must {@link leave} the lineup when it is over. */
    enter() {
        this.#current.requests++;
        return this.#current;
    }
    leave(lineup) {
        lineup.requests--;
        this.#retire(lineup);
    }
    get backends() {
        return this.#current.backends;
    }
    /** Names and state of all servers in use, those included that only finish their requests. */
    get all() {
        const all = new Map();
        for (const lineup of this.#lineups)
            for (const each of lineup.backends)
                all.set(each.live, each.name);
        return [...all].map(([live, name]) => ({ name, live }));
    }
    get available() {
        return this.backends.some(backend => backend.available);
    }
    async destroy() {
        const all = new Set([...this.all.map(({ live }) => live), ...this.#closing]);
        await Promise.all([...all].map(live => live.destroy()));
    }
    /** Lets go of the servers that only this lineup has, when nothing is under way with it. */
    #retire(lineup) {
        if (lineup === this.#current || lineup.requests > 0)
            return;
        this.#lineups.delete(lineup);
        const stays = new Set(this.all.map(({ live }) => live));
        for (const { live } of lineup.backends)
            if (!stays.has(live))
                void this.#close(live);
    }
    async #close(live) {
        this.#closing.add(live);
        await live.close();
        this.#closing.delete(live);
    }
}
/** Connections can be kept: what they were opened with has not changed. */
function isSame(before, after) {
    return (before.name === after.name &&
        before.url === after.url &&
        before.connectTimeout === after.connectTimeout);
}
