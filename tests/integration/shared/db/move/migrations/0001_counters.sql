-- Counters and their notes: what a move must carry, foreign keys and unique values included.
CREATE TABLE counter (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    value bigint NOT NULL CHECK (value >= 0),
    place bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CONSTRAINT counter_bucket CHECK (bucket = tenfold_bucket_of(id))
);
CREATE UNIQUE INDEX counter_place ON counter (bucket, place);

CREATE TABLE note (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    counter_id uuid NOT NULL,
    body text NOT NULL,
    PRIMARY KEY (bucket, id),
    FOREIGN KEY (bucket, counter_id) REFERENCES counter (bucket, id) ON DELETE CASCADE
);
