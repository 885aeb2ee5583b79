-- One row per applied event, and one more for every time it is applied again.
CREATE TABLE applied (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL,
    aggregate text NOT NULL,
    event_no bigint NOT NULL,
    reference text NOT NULL,
    at bigint NOT NULL,
    PRIMARY KEY (bucket, id)
);
