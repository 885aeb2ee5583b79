-- What every shard has, whatever service it belongs to.

-- Who owns a bucket. The truth; every map elsewhere is a hint.
-- States: ABSENT, ACTIVE, MOVING, FENCED, MOVED, IMPORTING, ABORTED.
CREATE TABLE tenfold_bucket (
    bucket smallint PRIMARY KEY CHECK (bucket BETWEEN 0 AND 4095),
    state text NOT NULL CHECK (
        state IN ('ABSENT', 'ACTIVE', 'MOVING', 'FENCED', 'MOVED', 'IMPORTING', 'ABORTED')),
    epoch bigint NOT NULL,
    move_id uuid,
    mtoken bigint NOT NULL DEFAULT 0,
    peer text,
    fence_until_us bigint
);

-- Which shard this is; one row.
CREATE TABLE tenfold_shard (
    one smallint PRIMARY KEY CHECK (one = 1),
    shard_id bigint NOT NULL,
    timeline bigint NOT NULL,
    schema_version bigint NOT NULL
);

-- Work that only one process may do; the token only grows.
CREATE TABLE tenfold_lease (
    name text PRIMARY KEY,
    holder text NOT NULL,
    token bigint NOT NULL,
    expires_at_us bigint NOT NULL
);

-- Events and jobs, until they are published and for a while after.
CREATE TABLE outbox (
    seq tenfold_identity,
    bucket smallint NOT NULL,
    event_id uuid NOT NULL,
    aggregate text NOT NULL,
    event_no bigint NOT NULL,
    subject text NOT NULL,
    headers text NOT NULL,
    payload bytea NOT NULL,
    tenant text NOT NULL,
    created_at_us bigint NOT NULL,
    sent smallint NOT NULL DEFAULT 0 CHECK (sent IN (0, 1)),
    ack_stream text,
    ack_seq bigint
);
CREATE UNIQUE INDEX outbox_event ON outbox (event_id);
CREATE UNIQUE INDEX outbox_number ON outbox (bucket, aggregate, event_no);
CREATE INDEX outbox_unsent ON outbox (seq) WHERE sent = 0;
CREATE INDEX outbox_sent ON outbox (created_at_us) WHERE sent = 1;

-- The last number given to an event of an aggregate.
CREATE TABLE event_counter (
    bucket smallint NOT NULL,
    aggregate text NOT NULL,
    event_no bigint NOT NULL,
    PRIMARY KEY (bucket, aggregate)
);

-- Messages that have had their effect.
CREATE TABLE inbox (
    bucket smallint NOT NULL,
    consumer text NOT NULL,
    msg_id uuid NOT NULL,
    at_us bigint NOT NULL,
    PRIMARY KEY (bucket, consumer, msg_id)
);
CREATE INDEX inbox_age ON inbox (at_us);

-- How far a consumer has come with an aggregate.
CREATE TABLE inbox_pos (
    bucket smallint NOT NULL,
    consumer text NOT NULL,
    aggregate text NOT NULL,
    event_no bigint NOT NULL,
    PRIMARY KEY (bucket, consumer, aggregate)
);

-- Messages that an operator must look at.
CREATE TABLE dead_letter (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    consumer text NOT NULL,
    subject text NOT NULL,
    headers text NOT NULL,
    payload bytea NOT NULL,
    error text NOT NULL,
    tries bigint NOT NULL,
    at_us bigint NOT NULL,
    PRIMARY KEY (bucket, id)
);

-- What has been answered under a request id. In the key's home bucket target_bucket says
-- where the effect is; CLAIMED there means: look in that bucket.
CREATE TABLE idempotency (
    bucket smallint NOT NULL,
    scope text NOT NULL,
    key text NOT NULL,
    req_hash bytea NOT NULL,
    target_bucket smallint NOT NULL,
    status text NOT NULL CHECK (status IN ('CLAIMED', 'DONE', 'REFUSED')),
    response bytea NOT NULL,
    created_at_us bigint NOT NULL,
    PRIMARY KEY (bucket, scope, key)
);
CREATE INDEX idempotency_age ON idempotency (created_at_us);

-- Values that are unique in the whole service, such as e-mail addresses.
CREATE TABLE uniq (
    bucket smallint NOT NULL,
    tenant text NOT NULL,
    kind text NOT NULL,
    value text NOT NULL,
    owner_id uuid,
    claim_id uuid,
    state text NOT NULL CHECK (state IN ('RESERVED', 'CONFIRMED', 'FREE')),
    expires_at_us bigint NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    PRIMARY KEY (bucket, tenant, kind, value)
);

-- Decides between the creation of an id and the theft of its claim.
CREATE TABLE id_slot (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    state text NOT NULL CHECK (state IN ('LIVE', 'DEAD')),
    PRIMARY KEY (bucket, id)
);

-- Steps that a worker must finish if the caller does not.
CREATE TABLE todo (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    kind text NOT NULL,
    next_at_us bigint NOT NULL,
    tries bigint NOT NULL DEFAULT 0,
    payload bytea NOT NULL,
    PRIMARY KEY (bucket, id, kind)
);
CREATE INDEX todo_due ON todo (next_at_us);
