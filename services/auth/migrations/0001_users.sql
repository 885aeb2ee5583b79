-- Users, their sessions and keys, each in its user's bucket.

CREATE TABLE app_user (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    email text NOT NULL,
    password_hash text NOT NULL,
    display_name text NOT NULL,
    locale text NOT NULL,
    role text NOT NULL CHECK (role IN ('user')),
    state text NOT NULL CHECK (state IN ('ACTIVE', 'DISABLED')),
    created_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id)),
    CHECK (id = owner)
);

-- counter: how often the session was refreshed; rotated_us: when last.
CREATE TABLE session (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    state text NOT NULL CHECK (state IN ('ACTIVE', 'REVOKED')),
    counter bigint NOT NULL CHECK (counter >= 0),
    rotated_us bigint NOT NULL,
    created_us bigint NOT NULL,
    expires_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id))
);
CREATE INDEX session_newest ON session (bucket, tenant, owner, id);

-- A program's identity; the first start makes one for the admin key.
CREATE TABLE service_account (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    display_name text NOT NULL,
    created_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id)),
    CHECK (id = owner)
);

-- secret_hash: SHA-256 of the whole key (enough for 160 random bits, ASVS 6.5.2).
CREATE TABLE api_key (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    kind text NOT NULL CHECK (kind IN ('user', 'admin')),
    display_name text NOT NULL,
    scopes text NOT NULL,
    prefix text NOT NULL,
    last_four text NOT NULL,
    secret_hash bytea NOT NULL,
    state text NOT NULL CHECK (state IN ('ACTIVE', 'REVOKED')),
    created_us bigint NOT NULL,
    expires_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id))
);
CREATE UNIQUE INDEX api_key_secret ON api_key (bucket, secret_hash);
CREATE INDEX api_key_newest ON api_key (bucket, tenant, owner, id);

-- id: the session or key that has ended; kept until its tokens have expired.
CREATE TABLE revocation (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    created_us bigint NOT NULL,
    forget_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id))
);
CREATE INDEX revocation_age ON revocation (created_us);
