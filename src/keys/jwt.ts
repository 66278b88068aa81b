import { readFile } from 'node:fs/promises'
import type { FastifyBaseLogger } from 'fastify'
import type { JWTPayload, JWTVerifyGetKey } from 'jose'
import { type Static, Type } from 'typebox'
import type { GatewayError } from '../errors.ts'
import { Duration, Section, Url } from '../options.ts'
import { type OnUnreadable, parseJson, toAnswer } from './answer.ts'
import { FollowedFile } from './followed.ts'
import type { KeyRecord, KeySource } from './key.ts'

const Claim = (fallback: string, description: string) =>
  Type.String({ minLength: 1, default: fallback, description })

/** Whoever can check a token must not be able to make one: no algorithm with a shared secret. */
const ALGORITHMS = [
  ...['RS256', 'RS384', 'RS512', 'PS256', 'PS384', 'PS512'],
  ...['ES256', 'ES384', 'ES512', 'EdDSA', 'Ed25519']
]

export const JwtKeysOptions = Type.Object(
  {
    jwks_url: Type.Optional(Url('Where the public keys are')),
    jwks_file: Type.Optional(
      Type.String({
        minLength: 1,
        description: 'Instead of jwks_url: a file, read again when it changes'
      })
    ),
    issuer: Type.String({ minLength: 1, description: 'Who must have made a token (iss)' }),
    audience: Type.String({ minLength: 1, description: 'Whom it must be made for (aud)' }),
    algorithms: Type.Array(Type.Enum(ALGORITHMS), {
      minItems: 1,
      default: ['RS256', 'PS256', 'ES256', 'EdDSA', 'Ed25519'],
      description: 'Algorithms that are taken'
    }),
    leeway: Duration('30s', 'How far clocks may be apart', 0),
    timeout: Duration('5s', 'How long jwks_url may take'),
    claims: Section(
      {
        id: Claim('sub', 'Whom limits and bills hang on; a token without it is refused'),
        user_id: Claim('sub', 'Who pays'),
        name: Claim('name', 'Name in logs and bills'),
        models: Claim('models', 'Models, a list or a text with commas; none: all')
      },
      'What stands in which claim'
    )
  },
  {
    additionalProperties: false,
    check: hasOneJwks,
    expects: 'a mapping with either jwks_url or jwks_file',
    description: 'Signed tokens instead of keys'
  }
)
export type JwtKeysOptions = Static<typeof JwtKeysOptions>

function hasOneJwks(options: unknown): boolean {
  const { jwks_url, jwks_file } = (options ?? {}) as { jwks_url?: unknown; jwks_file?: unknown }
  return (jwks_url === undefined) !== (jwks_file === undefined)
}

const TOKEN = /^[\w-]+\.[\w-]+\.[\w-]+$/
/** What jose says of a token that is not good; anything else says that it couldn't be checked. */
const NOT_GOOD = new Set([
  'ERR_JWS_INVALID',
  'ERR_JWT_INVALID',
  'ERR_JWS_SIGNATURE_VERIFICATION_FAILED',
  'ERR_JWT_CLAIM_VALIDATION_FAILED',
  'ERR_JOSE_ALG_NOT_ALLOWED',
  'ERR_JOSE_NOT_SUPPORTED',
  'ERR_JWKS_NO_MATCHING_KEY',
  'ERR_JWKS_MULTIPLE_MATCHING_KEYS'
])

type Jose = typeof import('jose')

/** Signed tokens (JWT) that stand for keys; the id of one is the source's name and the token's `sub`. */
export class JwtKeys implements KeySource {
  readonly name: string
  readonly #options: JwtKeysOptions
  readonly #onUnreadable: OnUnreadable
  readonly #file: FollowedFile<{ keys: object[] }> | undefined
  #loading: Promise<{ jose: Jose; keyFor: JWTVerifyGetKey }> | undefined

  /** @throws when `jwks_file` can't be used */
  static async open(
    name: string,
    options: JwtKeysOptions,
    onUnreadable: OnUnreadable,
    log: FastifyBaseLogger
  ): Promise<JwtKeys> {
    const { jwks_file: path } = options
    if (path === undefined) return new JwtKeys(name, options, onUnreadable)
    const load = async () => toJwks(await readFile(path, 'utf8'))
    return new JwtKeys(name, options, onUnreadable, await FollowedFile.open(path, load, log))
  }

  private constructor(
    name: string,
    options: JwtKeysOptions,
    onUnreadable: OnUnreadable,
    file?: FollowedFile<{ keys: object[] }>
  ) {
    this.name = name
    this.#options = options
    this.#onUnreadable = onUnreadable
    this.#file = file
  }

  async lookup(token: string, hash: string): Promise<KeyRecord | GatewayError | undefined> {
    if (!TOKEN.test(token)) return undefined
    this.#loading ??= this.#load()
    const { jose, keyFor } = await this.#loading
    const { issuer, audience, algorithms, leeway } = this.#options
    try {
      const { payload } = await jose.jwtVerify(token, keyFor, {
        issuer,
        audience,
        algorithms,
        clockTolerance: leeway / 1000,
        requiredClaims: ['exp']
      })
      return await this.#toAnswer(payload, hash)
    } catch (error) {
      const { code, payload } = error as { code?: string; payload?: JWTPayload }
      if (code === 'ERR_JWT_EXPIRED') return this.#toAnswer(payload!, hash)
      if (NOT_GOOD.has(code ?? '')) return undefined
      throw error
    }
  }

  async close(): Promise<void> {
    this.#file?.close()
  }

  async #toAnswer(
    payload: JWTPayload,
    hash: string
  ): Promise<KeyRecord | GatewayError | undefined> {
    const { claims, leeway } = this.#options
    const id = payload[claims.id]
    if (typeof id !== 'string' || id === '') return undefined
    const said = {
      id: `${this.name}:${id}`,
      user_id: payload[claims.user_id],
      name: payload[claims.name],
      models: payload[claims.models],
      expires_at: payload.exp! * 1000 + leeway
    }
    return toAnswer(said, hash, this.#onUnreadable)
  }

  async #load() {
    const jose = await import('jose')
    const { jwks_url, timeout } = this.#options
    const keyFor: JWTVerifyGetKey =
      jwks_url === undefined
        ? (header, token) => jose.createLocalJWKSet(this.#file!.content)(header, token)
        : jose.createRemoteJWKSet(new URL(jwks_url), { timeoutDuration: timeout })
    return { jose, keyFor }
  }
}

function toJwks(text: string): { keys: object[] } {
  const jwks = parseJson(text) as { keys?: object[] } | undefined
  // What it is instead may be a secret.
  if (!Array.isArray(jwks?.keys)) throw new Error('a JSON Web Key Set is JSON with a list of keys')
  return { keys: jwks.keys }
}
