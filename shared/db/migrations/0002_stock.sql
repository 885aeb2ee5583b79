-- Stocks: what an owner may hold or use up of something, counted in its owner's bucket.

-- kind: what is counted ("stored-bytes"). period: '' for what is held, a day for what is used up.
CREATE TABLE stock (
    bucket smallint NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    kind text NOT NULL,
    period text NOT NULL,
    used bigint NOT NULL CHECK (used >= 0),
    reserved bigint NOT NULL CHECK (reserved >= 0),
    PRIMARY KEY (bucket, tenant, owner, kind, period)
);

-- What is counted there: one row for each thing that reserves or holds a part. What is used up for
-- good has no row any more.
CREATE TABLE stock_entry (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    kind text NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    period text NOT NULL,
    amount bigint NOT NULL CHECK (amount > 0),
    is_held smallint NOT NULL CHECK (is_held IN (0, 1)),
    PRIMARY KEY (bucket, id, kind)
);
