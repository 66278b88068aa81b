import type { FastifyPluginAsync } from 'fastify';
import { type Static, Type } from 'typebox';
import { type Caller } from '../exchange.ts';
import { type StaticKey } from '../keys/static.ts';
import { type Given } from '../options.ts';
export declare const AuthOptions: Type.TObject<{
    enabled: Type.TBoolean;
    mode: Type.TEnum<["first_match", "all"]>;
    header_names: Type.TArray<Type.TString>;
    skip_paths: Type.TArray<Type.TString>;
    status_codes: Type.TObject<{
        active: Type.TObject<{
            allow: Type.TBoolean;
            http_code: Type.TInteger;
            message: Type.TString;
        }>;
        disabled: Type.TObject<{
            allow: Type.TBoolean;
            http_code: Type.TInteger;
            message: Type.TString;
        }>;
        expired: Type.TObject<{
            allow: Type.TBoolean;
            http_code: Type.TInteger;
            message: Type.TString;
        }>;
        quota_exceeded: Type.TObject<{
            allow: Type.TBoolean;
            http_code: Type.TInteger;
            message: Type.TString;
        }>;
        not_found: Type.TObject<{
            allow: Type.TBoolean;
            http_code: Type.TInteger;
            message: Type.TString;
        }>;
    }>;
    keys: Type.TArray<Type.TObject<{
        key: Type.TString;
        name: Type.TOptional<Type.TString>;
        user_id: Type.TOptional<Type.TString>;
        status: Type.TOptional<Type.TUnsafe<string | number>>;
        starts_at: Type.TOptional<Type.TUnsafe<string | number>>;
        expires_at: Type.TOptional<Type.TUnsafe<string | number>>;
        allowed_ips: Type.TOptional<Type.TArray<Type.TString>>;
        denied_ips: Type.TOptional<Type.TArray<Type.TString>>;
        models: Type.TOptional<Type.TArray<Type.TString>>;
        total_quota: Type.TOptional<Type.TUnsafe<unknown>>;
        used_quota: Type.TOptional<Type.TUnsafe<unknown>>;
        quota_reset_period: Type.TOptional<Type.TEnum<["never", "daily", "weekly", "monthly"]>>;
        last_reset_at: Type.TOptional<Type.TUnsafe<string | number>>;
        created_at: Type.TOptional<Type.TUnsafe<string | number>>;
        updated_at: Type.TOptional<Type.TUnsafe<string | number>>;
    }>>;
    pipeline: Type.TArray<Type.TObject<{
        name: Type.TOptional<Type.TString>;
        type: Type.TEnum<["static", "webhook"]>;
        enabled: Type.TBoolean;
        static: Type.TOptional<Type.TObject<{
            keys: Type.TArray<Type.TObject<{
                key: Type.TString;
                name: Type.TOptional<Type.TString>;
                user_id: Type.TOptional<Type.TString>;
                status: Type.TOptional<Type.TUnsafe<string | number>>;
                starts_at: Type.TOptional<Type.TUnsafe<string | number>>;
                expires_at: Type.TOptional<Type.TUnsafe<string | number>>;
                allowed_ips: Type.TOptional<Type.TArray<Type.TString>>;
                denied_ips: Type.TOptional<Type.TArray<Type.TString>>;
                models: Type.TOptional<Type.TArray<Type.TString>>;
                total_quota: Type.TOptional<Type.TUnsafe<unknown>>;
                used_quota: Type.TOptional<Type.TUnsafe<unknown>>;
                quota_reset_period: Type.TOptional<Type.TEnum<["never", "daily", "weekly", "monthly"]>>;
                last_reset_at: Type.TOptional<Type.TUnsafe<string | number>>;
                created_at: Type.TOptional<Type.TUnsafe<string | number>>;
                updated_at: Type.TOptional<Type.TUnsafe<string | number>>;
            }>>;
        }>>;
        webhook: Type.TOptional<Type.TObject<{
            url: Type.TString;
            method: Type.TEnum<["POST", "PUT"]>;
            timeout: Type.TUnsafe<number>;
            headers: Type.TRecord<"^.*$", Type.TString>;
        }>>;
        lua: Type.TOptional<Type.TUnsafe<unknown>>;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
        redis: Type.TOptional<Type.TUnsafe<unknown>>;
        database: Type.TOptional<Type.TUnsafe<unknown>>;
    }>>;
}>;
export type AuthOptions = Static<typeof AuthOptions>;
/** A key alone may be given as text. */
export type GivenAuthOptions = Given<Omit<AuthOptions, 'keys'>> & {
    keys?: readonly (string | Given<StaticKey>)[];
};
declare module 'fastify' {
    interface FastifyRequest {
        caller: Caller | undefined;
    }
    interface FastifyInstance {
        keys: {
            update(options: AuthOptions): void;
            credentialHeaders(): readonly string[];
        };
    }
}
declare const _default: FastifyPluginAsync<GivenAuthOptions>;
export default _default;
