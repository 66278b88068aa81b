import { type Static, Type } from 'typebox';
import { type KeyRecord, type KeySource } from './key.ts';
/** One key in the configuration. Text alone is the key itself. */
export declare const StaticKey: Type.TObject<{
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
}>;
export type StaticKey = Static<typeof StaticKey>;
/** A list of keys: each once, and each name once, since limits and bills hang on it. */
export declare const StaticKeyList: (description: string) => Type.TArray<Type.TObject<{
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
/** Keys from the configuration, kept as hashes. */
export declare class StaticKeys implements KeySource {
    #private;
    readonly name: string;
    constructor(name: string, keys: StaticKey[]);
    lookup(_key: string, hash: string): Promise<KeyRecord | undefined>;
    get size(): number;
}
