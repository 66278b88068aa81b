/**
 * What the simulated fleet is asked: sessions of calls, each of which repeats the one before and adds to
 * it. The figures are fixed by what is published of real traffic, and by nothing else:
 *
 * - chat: prompts of 12,000 tokens and answers of 343 on average, as in the conversation trace of
 *   Mooncake (https://www.usenix.org/conference/fast25/presentation/qin); 73 % of the conversations have
 *   several turns, 5.75 on average, as ShareGPT's have (https://arxiv.org/abs/2403.19708).
 * - agent: a coding agent that reads 131 tokens for each that it writes, grows by some hundred to some
 *   thousand tokens a step, and has about 80,000 at step 30, as Codex on SWE-bench Pro
 *   (https://vllm.ai/blog/2026-05-06-mooncake-store); a step adds some 900 tokens and writes some 250 at
 *   the median (https://tracelab.cs.washington.edu/exp/llm_generation/token_length_distribution/).
 * - no_reuse: prompts that have nothing in common, half of them like those of Azure's conversation
 *   service (median 1,020 tokens, answers 129) and half like those of its coding service (1,500 and 13),
 *   https://arxiv.org/abs/2311.18677.
 *
 * How long people and tools take is not published with them and is assumed: 30 s and 2 s at the median.
 */

/** One call of a session: what it adds to the one before, and how long (ms) after that one's answer it comes. */
export interface Turn {
  tokens: number
  outputTokens: number
  gap: number
}

export interface Trace {
  name: string
  /** Tokens that all sessions of one caller begin with, a whole number of blocks. */
  systemTokens: number
  callers: number
  /** For how long (s) calls come before any is counted, and how long after that. */
  warmUp: number
  measured: number
  session(random: Random): Turn[]
}

/** Numbers from 0 to 1, the same for the same seed. */
export type Random = () => number

/** Mulberry32, https://gist.github.com/tommyettinger/46a874533244883189143505d203312c */
export function seeded(seed: number): Random {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

export const TRACES: Trace[] = [
  {
    name: 'chat',
    systemTokens: 512,
    callers: 20,
    warmUp: 1500,
    measured: 600,
    session(random) {
      const turn = (median: number, sigma: number): Turn => ({
        tokens: between(16, lognormal(random, median, sigma), 100_000),
        outputTokens: between(1, lognormal(random, 250, 0.8), 4_000),
        gap: lognormal(random, 30_000, 1)
      })
      const turns = [turn(4_500, 1)]
      const others = random() < 0.27 ? 0 : geometric(random, 6.5)
      for (let at = 0; at < others; at++) turns.push(turn(400, 1.3))
      return turns
    }
  },
  {
    name: 'agent',
    systemTokens: 12_288,
    callers: 20,
    warmUp: 900,
    measured: 900,
    session(random) {
      const turns: Turn[] = []
      const steps = Math.min(60, geometric(random, 30))
      for (let at = 0; at < steps; at++) {
        turns.push({
          tokens: between(32, lognormal(random, 900, 1.2), 30_000),
          outputTokens: between(16, lognormal(random, 250, 0.9), 4_000),
          gap: lognormal(random, 2_000, 1.2)
        })
      }
      return turns
    }
  },
  {
    name: 'no_reuse',
    systemTokens: 0,
    callers: 20,
    warmUp: 60,
    measured: 180,
    session(random) {
      const isCode = random() < 0.5
      return [
        {
          tokens: between(16, lognormal(random, isCode ? 1_500 : 1_020, 0.8), 30_000),
          outputTokens: between(1, lognormal(random, isCode ? 13 : 129, 0.9), 4_000),
          gap: 0
        }
      ]
    }
  }
]

/** Tokens that a session's calls have in their prompts, all of them together. */
export function inputTokens(turns: Turn[], systemTokens: number): number {
  let context = systemTokens
  let sum = 0
  for (const turn of turns) {
    context += turn.tokens
    sum += context
    context += turn.outputTokens
  }
  return sum
}

/** A number of at least 1 with this mean. */
function geometric(random: Random, mean: number): number {
  return 1 + Math.floor(Math.log(1 - random()) / Math.log(1 - 1 / mean))
}

function lognormal(random: Random, median: number, sigma: number): number {
  const normal = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
  return median * Math.exp(sigma * normal)
}

function between(least: number, value: number, most: number): number {
  return Math.round(Math.max(least, Math.min(value, most)))
}
