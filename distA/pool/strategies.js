/**
 * Smooth weighted round robin, as nginx does it: weights 5 and 1 give AABAAA, not AAAAAB.
 * A candidate's place is kept while it is away and never makes it ineligible.
 */
const roundRobin = candidates => {
    let total = 0;
    for (const backend of candidates) {
        backend.live.currentWeight += backend.config.weight;
        total += backend.config.weight;
    }
    const chosen = best(candidates, backend => -backend.live.currentWeight);
    chosen.live.currentWeight -= total;
    return chosen;
};
/** Fewest in flight for its weight; among equals, weighted round robin. */
const leastConnections = (candidates, now) => {
    const load = (backend) => (backend.live.inFlight + 1) / backend.config.weight;
    const least = Math.min(...candidates.map(load));
    return roundRobin(candidates.filter(backend => load(backend) <= least), now);
};
/**
 * Shortest expected wait: time to first byte, times what is in flight. A backend nothing is known of
 * gets one call to show itself and counts as an average one meanwhile; one that is idle is forgiven
 * slowly and so gets another try.
 */
const latencyBased = (candidates, now) => {
    const known = candidates.map(backend => backend.live.latency(now)).filter(ms => ms !== undefined);
    const average = known.length === 0 ? 1 : known.reduce((sum, ms) => sum + ms, 0) / known.length;
    return best(candidates, backend => {
        const ms = backend.live.latency(now);
        if (ms === undefined && backend.live.inFlight === 0)
            return 0;
        return (ms ?? average) * (backend.live.inFlight + 1);
    });
};
const random = candidates => {
    const total = candidates.reduce((sum, backend) => sum + backend.config.weight, 0);
    let point = Math.random() * total;
    for (const backend of candidates) {
        point -= backend.config.weight;
        if (point < 0)
            return backend;
    }
    return candidates[0];
};
export const strategies = {
    round_robin: roundRobin,
    weighted: roundRobin,
    least_connections: leastConnections,
    latency_based: latencyBased,
    random
};
function best(candidates, cost) {
    let chosen = candidates[0];
    let least = cost(chosen);
    for (const backend of candidates) {
        const its = cost(backend);
        if (its < least) {
            chosen = backend;
            least = its;
        }
    }
    return chosen;
}
