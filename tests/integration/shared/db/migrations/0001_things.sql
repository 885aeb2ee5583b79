-- A service's own tables, as small as they may be.
CREATE TABLE thing (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    label text NOT NULL CONSTRAINT thing_label CHECK (length(label) < 100),
    PRIMARY KEY (bucket, id),
    CONSTRAINT thing_bucket CHECK (bucket = tenfold_bucket_of(id))
);
CREATE UNIQUE INDEX thing_label_once ON thing (tenant, label);
