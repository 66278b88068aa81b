import { type Static, Type } from 'typebox';
/** Everything a configuration file may hold. */
export declare const ConfigSchema: Type.TObject<{
    backends: Type.TArray<Type.TObject<{
        name: Type.TOptional<Type.TString>;
        url: Type.TString;
        weight: Type.TInteger;
        api_key: Type.TOptional<Type.TString>;
        headers: Type.TRecord<"^.*$", Type.TString>;
        timeout: Type.TOptional<Type.TUnsafe<number>>;
        connect_timeout: Type.TOptional<Type.TUnsafe<number>>;
        idle_timeout: Type.TOptional<Type.TUnsafe<number>>;
        max_idle_conns: Type.TOptional<Type.TUnsafe<unknown>>;
    }>>;
    routing: Type.TObject<{
        enabled: Type.TBoolean;
        load_balance: Type.TEnum<("latency_based" | "least_connections" | "random" | "round_robin" | "weighted")[]>;
        timeout: Type.TUnsafe<number>;
        connect_timeout: Type.TUnsafe<number>;
        idle_timeout: Type.TUnsafe<number>;
        retry: Type.TObject<{
            enabled: Type.TBoolean;
            max_retries: Type.TInteger;
            initial_wait: Type.TUnsafe<number>;
            max_wait: Type.TUnsafe<number>;
            multiplier: Type.TNumber;
            retry_on: Type.TArray<Type.TEnum<["connect_failure", "timeout", "5xx", "429"]>>;
        }>;
        fallback: Type.TOptional<Type.TUnsafe<unknown>>;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
    }>;
    health_check: Type.TObject<{
        enabled: Type.TBoolean;
        interval: Type.TUnsafe<number>;
        timeout: Type.TUnsafe<number>;
        method: Type.TEnum<["GET", "HEAD", "POST"]>;
        path: Type.TString;
        expected_status: Type.TInteger;
        unhealthy_threshold: Type.TInteger;
        healthy_threshold: Type.TInteger;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
    }>;
    auth: Type.TObject<{
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
    rate_limit: Type.TObject<{
        enabled: Type.TBoolean;
        storage: Type.TEnum<["memory"]>;
        redis: Type.TOptional<Type.TString>;
        script: Type.TOptional<Type.TUnsafe<unknown>>;
        global: Type.TObject<{
            requests_per_second: Type.TInteger;
            requests_per_minute: Type.TInteger;
            burst_size: Type.TInteger;
            max_concurrent: Type.TInteger;
            tokens_per_minute: Type.TOptional<Type.TUnsafe<unknown>>;
            enabled: Type.TBoolean;
        }>;
        per_key: Type.TObject<{
            requests_per_second: Type.TInteger;
            requests_per_minute: Type.TInteger;
            burst_size: Type.TInteger;
            max_concurrent: Type.TInteger;
            tokens_per_minute: Type.TOptional<Type.TUnsafe<unknown>>;
            enabled: Type.TBoolean;
        }>;
    }>;
    usage: Type.TObject<{
        enabled: Type.TBoolean;
        reporters: Type.TArray<Type.TObject<{
            name: Type.TOptional<Type.TString>;
            type: Type.TEnum<["webhook"]>;
            enabled: Type.TBoolean;
            webhook: Type.TOptional<Type.TObject<{
                url: Type.TString;
                method: Type.TEnum<["POST", "PUT"]>;
                timeout: Type.TUnsafe<number>;
                retry: Type.TInteger;
                headers: Type.TRecord<"^.*$", Type.TString>;
                batch: Type.TObject<{
                    max_events: Type.TInteger;
                    max_wait: Type.TUnsafe<number>;
                }>;
                include_request_body: Type.TBoolean;
            }>>;
            database: Type.TOptional<Type.TUnsafe<unknown>>;
            builtin: Type.TOptional<Type.TUnsafe<unknown>>;
            script: Type.TOptional<Type.TUnsafe<unknown>>;
        }>>;
    }>;
    metrics: Type.TObject<{
        enabled: Type.TBoolean;
        path: Type.TString;
        latency_buckets: Type.TArray<Type.TNumber>;
        custom_labels: Type.TOptional<Type.TUnsafe<unknown>>;
    }>;
    server: Type.TObject<{
        listen: Type.TString;
        workers: Type.TUnsafe<number | "auto">;
        header_timeout: Type.TUnsafe<number>;
        read_timeout: Type.TUnsafe<number>;
        write_timeout: Type.TUnsafe<number>;
        idle_timeout: Type.TUnsafe<number>;
        max_header_bytes: Type.TUnsafe<number>;
        max_body_size: Type.TUnsafe<number>;
        trust_proxy: Type.TUnsafe<boolean | string[]>;
        drain_timeout: Type.TUnsafe<number>;
        cors: Type.TObject<{
            enabled: Type.TBoolean;
            allowed_origins: Type.TArray<Type.TString>;
            allowed_methods: Type.TArray<Type.TString>;
            allowed_headers: Type.TArray<Type.TString>;
            expose_headers: Type.TArray<Type.TString>;
            allow_credentials: Type.TBoolean;
            max_age: Type.TInteger;
        }>;
        tls: Type.TObject<{
            enabled: Type.TBoolean;
            cert_file: Type.TOptional<Type.TString>;
            key_file: Type.TOptional<Type.TString>;
            client_ca_file: Type.TOptional<Type.TString>;
            client_auth: Type.TEnum<["none", "request", "require"]>;
        }>;
    }>;
    log: Type.TObject<{
        level: Type.TEnum<["trace", "debug", "info", "warn", "error", "fatal", "silent"]>;
        format: Type.TEnum<["auto", "json", "text"]>;
        output: Type.TEnum<["stdout", "stderr", "file"]>;
        file: Type.TObject<{
            path: Type.TString;
            rotate: Type.TOptional<Type.TUnsafe<unknown>>;
            max_size: Type.TOptional<Type.TUnsafe<unknown>>;
            max_age: Type.TOptional<Type.TUnsafe<unknown>>;
            compress: Type.TOptional<Type.TUnsafe<unknown>>;
        }>;
    }>;
    storage: Type.TOptional<Type.TUnsafe<unknown>>;
    discovery: Type.TOptional<Type.TUnsafe<unknown>>;
    admin: Type.TOptional<Type.TUnsafe<unknown>>;
    logging: Type.TOptional<Type.TUnsafe<unknown>>;
    hooks: Type.TOptional<Type.TUnsafe<unknown>>;
}>;
export type Config = Readonly<Static<typeof ConfigSchema>>;
/** Thrown for a file that can't be used: one line for each error, all of them. */
export declare class ConfigError extends Error {
    name: string;
}
/**
 * Reads and checks a configuration file.
 *
 * @throws {ConfigError} with lines such as
 *   `config.yaml:12:5 backends[0].weight: must be a positive integer (got "ten")`
 */
export declare function loadConfig(file: string, env?: NodeJS.ProcessEnv): Promise<Config>;
/**
 * Checks the text of a configuration file and completes it with the defaults.
 *
 * @example
 * parseConfig('backends: [{url: "http://vllm:8000"}]', 'config.yaml', {}).server.listen // ':8000'
 */
export declare function parseConfig(yaml: string, name: string, env: NodeJS.ProcessEnv): Config;
