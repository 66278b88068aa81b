import { GatewayError } from '../errors.js';
import { Answer } from './answer.js';
import { Refusal } from './refusal.js';
/** A failed attempt counts as this slow (ms) when backends are compared by latency. */
const FAILURE_LATENCY = 10_000;
/** A refusal to serve a request counts as at least this slow: it must not attract others. */
const REFUSAL_LATENCY = 1_000;
const NOBODY = {
    deliver() { },
    refused: () => false,
    failed() { },
    broke() { },
    again() { },
    question: undefined,
    count() { }
};
/** One try at one backend. */
export class Attempt {
    socket;
    backend;
    #owner;
    #startedAt = performance.now();
    #controller;
    #head;
    #answer;
    #isDelivered = false;
    #isOver = false;
    #isCancelled = false;
    /** The error answer, while it is not certain that it is the client's. */
    #refusal;
    /** It may be our own question for usage that is refused. */
    #isInDoubt = false;
    constructor(owner, backend) {
        this.#owner = owner;
        this.backend = backend;
    }
    start(options, fresh) {
        this.backend.live.begin();
        this.backend.dispatch(options, this, fresh);
    }
    /** Closes the connection, in whatever phase it is. */
    cancel() {
        if (this.#isOver)
            return;
        this.#isCancelled = true;
        if (!this.#isDelivered && this.#refusal === undefined)
            this.#owner.count(this, 'cancelled');
        this.#end();
        const reason = new GatewayError('client_gone', 'The client has left.');
        if (this.#controller !== undefined)
            this.#controller.abort(reason);
        else
            this.socket?.destroy(reason);
    }
    /**
     * The exchange is over. V8 promotes what is in flight to its old generation, where the dead keep
     * each other alive until a full collection: whatever is let go of here dies young.
     */
    letGo() {
        this.#owner = NOBODY;
        this.#controller = undefined;
        this.#head = undefined;
    }
    onRequestStart(controller) {
        this.#controller = controller;
        if (this.#isCancelled)
            controller.abort(new Error('cancelled before it began'));
    }
    onResponseStart(controller, statusCode, headers) {
        if (statusCode < 200)
            return;
        this.#head = { statusCode, headers };
        const { question } = this.#owner;
        if (statusCode === 400 || statusCode === 422) {
            if (question === 'asked') {
                this.#isInDoubt = true;
                this.#refusal = new Refusal(this.#head, controller);
                return;
            }
        }
        else if (question === 'withdrawn' && statusCode < 400)
            this.backend.live.refuseUsageQuestion();
        const kind = statusFailure(statusCode);
        if (kind !== undefined) {
            this.#penalise();
            const refusal = new Refusal(this.#head, controller);
            if (this.#owner.refused(this, kind, refusal)) {
                this.#owner.count(this, kind);
                this.#refusal = refusal;
                return;
            }
        }
        this.#answer = new Answer(controller);
    }
    onResponseData(controller, chunk) {
        if (this.#refusal === undefined) {
            this.#answer.data(chunk);
            // What came in the same piece is on its way: an answer may be whole when it is delivered.
            if (!this.#isDelivered)
                queueMicrotask(() => this.#deliverOnce());
        }
        else if (!this.#refusal.data(chunk))
            this.#outgrown(controller, chunk);
    }
    onResponseEnd() {
        this.#end();
        if (this.#isInDoubt)
            return this.#settleDoubt(this.#refusal);
        if (this.#refusal !== undefined)
            return this.#refusal.end();
        if (!this.#isDelivered)
            this.#deliver(true);
        this.#answer.end();
    }
    onResponseError(_controller, error) {
        this.#end();
        // An answer that was destroyed is one that its client gave up.
        if (this.#isCancelled || this.#answer?.destroyed)
            return;
        if (this.#isDelivered)
            return this.#answer.break(this.#broke(error));
        if (this.#refusal !== undefined && !this.#isInDoubt)
            return this.#refusal.lose();
        const kind = isTimeout(error) ? 'timeout' : 'connect_failure';
        // An error of our own making is about the request's body: the backend is not to blame.
        const isReused = this.socket === undefined && this.#head === undefined;
        if (!(error instanceof GatewayError)) {
            this.#owner.count(this, kind);
            if (!isReused)
                this.#penalise();
        }
        this.#owner.failed(this, kind, error, { isSent: this.#controller !== undefined, isReused });
    }
    #deliverOnce() {
        if (!this.#isDelivered && !this.#isOver)
            this.#deliver();
    }
    #deliver(complete = false) {
        this.#isDelivered = true;
        this.#answer.whenCutShort = () => this.#broke(new Error('the stream ended without its end'));
        this.#answer.offer(complete);
        const { statusCode } = this.#head;
        this.#owner.count(this, statusFailure(statusCode) ?? `${Math.floor(statusCode / 100)}xx`);
        this.#observe(statusCode);
        this.#owner.deliver(this, this.#head, this.#answer);
    }
    /** Being refused fast is no merit; a refusal of the gateway's own key is a failure. */
    #observe(statusCode) {
        if (statusCode >= 500 || statusCode === 429)
            return;
        if (statusCode === 401 || statusCode === 403)
            return this.#penalise();
        const now = performance.now();
        const ms = now - this.#startedAt;
        const least = statusCode < 400 ? 0 : (this.backend.live.latency(now) ?? REFUSAL_LATENCY);
        this.backend.live.observeLatency(Math.max(ms, least), now);
    }
    /** An error answer is too long to be kept. If it is the only one, it goes on as it comes. */
    #outgrown(controller, chunk) {
        const refusal = this.#refusal;
        if (!this.#isInDoubt)
            return controller.abort(new Error('the error answer is too long to be kept'));
        this.#isInDoubt = false;
        this.#refusal = undefined;
        this.#answer = new Answer(controller);
        for (const kept of [...refusal.chunks, chunk])
            this.#answer.data(kept);
        this.#deliver();
    }
    #settleDoubt(refusal) {
        if (/stream_options|include_usage/.test(refusal.text))
            return this.#owner.again(this);
        this.#answer = refusal.toAnswer();
        this.#deliver();
    }
    #broke(error) {
        const kind = isTimeout(error) ? 'timeout' : 'connect_failure';
        const isSilent = kind === 'timeout';
        const gatewayError = new GatewayError(isSilent ? 'backend_timeout' : 'backend_failed', isSilent
            ? 'The backend fell silent in the middle of its answer.'
            : 'The backend broke off in the middle of its answer.', { cause: error });
        this.#penalise();
        this.#owner.broke(this, kind, gatewayError);
        return gatewayError;
    }
    #penalise() {
        const now = performance.now();
        this.backend.live.observeLatency(Math.max(FAILURE_LATENCY, now - this.#startedAt), now);
    }
    #end() {
        if (this.#isOver)
            return;
        this.#isOver = true;
        this.backend.live.end();
    }
}
function statusFailure(statusCode) {
    if (statusCode >= 500)
        return '5xx';
    return statusCode === 429 ? '429' : undefined;
}
function isTimeout(error) {
    return error.code === 'UND_ERR_HEADERS_TIMEOUT' || error.code === 'UND_ERR_BODY_TIMEOUT';
}
