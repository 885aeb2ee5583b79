-- Sums, watermarks and report runs.

-- Partial sums: what the events of one bucket add to one owner's day. A reader adds up the
-- buckets. currency_code is empty for counts; value only grows.
CREATE TABLE daily_sum (
    bucket smallint NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    day text NOT NULL,
    metric text NOT NULL,
    currency_code text NOT NULL,
    value bigint NOT NULL CHECK (value >= 0),
    PRIMARY KEY (bucket, tenant, owner, day, metric, currency_code)
);
CREATE INDEX daily_sum_owner ON daily_sum (tenant, owner, day);
CREATE INDEX daily_sum_day ON daily_sum (tenant, day);

-- How far the events of one bucket and source are counted for an owner; the owner of all
-- zeros stands for the whole tenant, whose events are not the sum of its owners': a transfer
-- concerns two of them.
CREATE TABLE watermark (
    bucket smallint NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    source text NOT NULL,
    event_time_us bigint NOT NULL,
    event_count bigint NOT NULL CHECK (event_count > 0),
    PRIMARY KEY (bucket, tenant, owner, source)
);
CREATE INDEX watermark_owner ON watermark (tenant, owner);

-- A report as it was when it ran; never changed. sums is JSON.
CREATE TABLE report_run (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    version bigint NOT NULL,
    owner_name text NOT NULL,
    whole_tenant smallint NOT NULL CHECK (whole_tenant IN (0, 1)),
    first_day text NOT NULL,
    last_day text NOT NULL,
    sums text NOT NULL,
    event_time_us bigint,
    event_count bigint NOT NULL,
    degraded smallint NOT NULL CHECK (degraded IN (0, 1)),
    created_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CHECK (bucket = tenfold_bucket_of(id)),
    CHECK (bucket = tenfold_bucket_of(owner))
);
CREATE INDEX report_run_newest ON report_run (bucket, tenant, owner, id);
