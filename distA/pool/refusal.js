import { Answer } from './answer.js';
const MAX_KEPT = 64 * 1024;
/** A backend's error answer that is kept while others are tried, in case none does better. */
export class Refusal {
    head;
    chunks = [];
    #controller;
    #size = 0;
    #state = 'coming';
    #settled;
    constructor(head, controller) {
        this.head = head;
        this.#controller = controller;
    }
    /** Keeps a chunk; returns false, and does not, when it would be too much. */
    data(chunk) {
        if (this.#size + chunk.length > MAX_KEPT)
            return false;
        this.#size += chunk.length;
        this.chunks.push(chunk);
        return true;
    }
    end() {
        this.#settle('complete');
    }
    lose() {
        this.#settle('lost');
    }
    /** Calls back once, when all of it has come, or it is certain that it won't within `ms`. */
    whenSettled(ms, callback) {
        if (this.#state !== 'coming')
            return callback(this.#state === 'complete');
        const timer = setTimeout(() => this.#controller.abort(new Error('the rest did not come')), ms);
        this.#settled = isComplete => {
            clearTimeout(timer);
            callback(isComplete);
        };
    }
    get text() {
        return Buffer.concat(this.chunks).toString();
    }
    toAnswer() {
        const answer = new Answer({
            aborted: false,
            paused: false,
            reason: null,
            abort: () => { },
            pause: () => { },
            resume: () => { }
        });
        for (const chunk of this.chunks)
            answer.data(chunk);
        answer.end();
        return answer;
    }
    #settle(state) {
        this.#state = state;
        this.#settled?.(state === 'complete');
    }
}
