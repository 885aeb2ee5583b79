-- Contacts, inboxes and deliveries, each in its recipient's bucket.

-- Where a user can be reached; id is the user's.
CREATE TABLE contact (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL,
    email text NOT NULL,
    display_name text NOT NULL,
    locale text NOT NULL,
    created_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id)),
    CHECK (id = owner)
);

-- One row per inbox; id is the recipient's. version counts the inbox's changes.
CREATE TABLE inbox_summary (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL,
    unread_count bigint NOT NULL CHECK (unread_count >= 0),
    total_count bigint NOT NULL CHECK (total_count >= unread_count),
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id)),
    CHECK (id = owner)
);

-- position: the inbox's version at this item's last change.
CREATE TABLE inbox_item (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL,
    cause text NOT NULL,
    category text NOT NULL,
    title text NOT NULL,
    body text NOT NULL,
    subject text NOT NULL,
    position bigint NOT NULL,
    created_us bigint NOT NULL,
    read_us bigint,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id))
);

-- One notice per cause, recipient and category.
CREATE UNIQUE INDEX inbox_item_cause ON inbox_item (bucket, tenant, owner, cause, category);
-- No two changes of one inbox share a position: the stream's cursor is exact.
CREATE UNIQUE INDEX inbox_item_position ON inbox_item (bucket, tenant, owner, position);
CREATE INDEX inbox_item_newest ON inbox_item (bucket, tenant, owner, id);

-- next_attempt_us: when it is due; while SENDING, when the claim ends; NULL once final.
CREATE TABLE delivery (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL,
    item_id uuid NOT NULL,
    channel text NOT NULL CHECK (channel IN ('EMAIL')),
    state text NOT NULL CHECK (state IN ('QUEUED', 'SENDING', 'SENT', 'FAILED', 'UNKNOWN')),
    attempt_count bigint NOT NULL,
    lost_claim_count bigint NOT NULL,
    claim_holder uuid NOT NULL,
    reason text NOT NULL,
    created_us bigint NOT NULL,
    next_attempt_us bigint,
    sent_us bigint,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id)),
    CHECK ((next_attempt_us IS NULL) = (state IN ('SENT', 'FAILED', 'UNKNOWN')))
);

-- One delivery per notice and channel.
CREATE UNIQUE INDEX delivery_of_item ON delivery (bucket, item_id, channel);
CREATE INDEX delivery_due ON delivery (next_attempt_us) WHERE next_attempt_us IS NOT NULL;
CREATE INDEX delivery_sending ON delivery (claim_holder) WHERE state = 'SENDING';
CREATE INDEX delivery_newest ON delivery (bucket, tenant, owner, id);
