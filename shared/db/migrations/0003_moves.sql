-- What a bucket on its way to another shard leaves behind at each step.

-- With mtoken: which mover alone may go on; see shared/db/move/protocol.py.
ALTER TABLE tenfold_bucket ADD COLUMN mholder text NOT NULL DEFAULT '';

-- Rows that were written since the copy began; pk is the key in hexadecimal, by key column.
CREATE TABLE tenfold_dirty (
    seq tenfold_identity,
    bucket smallint NOT NULL,
    tbl text NOT NULL,
    pk text NOT NULL
);
CREATE INDEX tenfold_dirty_bucket ON tenfold_dirty (bucket, seq);

-- How far the copy has come, written at the destination together with each page.
CREATE TABLE tenfold_cursor (
    move_id uuid NOT NULL,
    tbl text NOT NULL,
    last_pk text NOT NULL,
    row_count bigint NOT NULL,
    PRIMARY KEY (move_id, tbl)
);
