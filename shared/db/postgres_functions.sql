-- Functions that every Postgres shard has. Not a migration: each start brings them up to date.

-- Bytes 7 and 8 of the id, less the version (RFC 9562).
CREATE OR REPLACE FUNCTION tenfold_bucket_of(id uuid) RETURNS int
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
    SELECT (get_byte(uuid_send(id), 6) & 15) << 8 | get_byte(uuid_send(id), 7)
$$;

-- Admission: the first statement of every transaction that writes. Whoever fences a bucket
-- holds its granule's lock exclusively, so after the wait the state is final for us. The lock
-- comes in a statement of its own: one that both waits and reads would read what was true
-- before the wait. Above READ COMMITTED every statement does, so there the row itself is locked,
-- and a fence that came between ends in 40001.
CREATE OR REPLACE FUNCTION tenfold_enter(buckets int[]) RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
DECLARE
    granule int;
    refused record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        PERFORM FROM tenfold_bucket WHERE bucket = ANY (buckets) ORDER BY bucket FOR SHARE;
    ELSE
        -- At most 64 locks, in one order: two batches never wait for each other.
        FOR granule IN SELECT DISTINCT number & 63 FROM unnest(buckets) AS number ORDER BY 1 LOOP
            PERFORM pg_advisory_xact_lock_shared(1413826126, granule);
        END LOOP;
    END IF;
    SELECT asked.number AS bucket, coalesce(held.state, 'ABSENT') AS state, held.peer, held.epoch
    INTO refused
    FROM unnest(buckets) AS asked (number)
    LEFT JOIN tenfold_bucket AS held ON held.bucket = asked.number
    WHERE coalesce(held.state, 'ABSENT') NOT IN ('ACTIVE', 'MOVING')
    ORDER BY asked.number LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'bucket_elsewhere' USING ERRCODE = 'MB001',
            DETAIL = row_to_json(refused)::text;
    END IF;
    IF cardinality(buckets) <= 16 THEN
        PERFORM set_config('tenfold.buckets', ',' || array_to_string(buckets, ',') || ',', true);
    ELSE
        -- The guards look a bucket up for each row that is written: in a list per granule, so that
        -- a batch over a thousand buckets does not read a thousand numbers each time.
        PERFORM set_config('tenfold.buckets', '', true),
            set_config('tenfold.granule_' || listed.granule, ',' || listed.numbers || ',', true)
        FROM (
            SELECT number & 63 AS granule, string_agg(number::text, ',') AS numbers
            FROM unnest(buckets) AS number GROUP BY number & 63
        ) AS listed;
    END IF;
    IF EXISTS (SELECT FROM tenfold_bucket WHERE bucket = ANY (buckets) AND state = 'MOVING') THEN
        PERFORM set_config('tenfold.capture', '1', true);
    END IF;
END
$$;

-- The same for one bucket under READ COMMITTED, which is nearly every transaction, in the shortest
-- way: a CALL is not planned, and a bare expression needs no statement of its own.
CREATE OR REPLACE PROCEDURE tenfold_enter_one(entered int)
LANGUAGE plpgsql AS $$
DECLARE
    held_state text;
    admitted text;
BEGIN
    IF pg_advisory_xact_lock_shared(1413826126, entered & 63) IS NOT NULL THEN END IF;
    SELECT state INTO held_state FROM tenfold_bucket WHERE bucket = entered;
    IF held_state = 'ACTIVE' AND current_setting('transaction_isolation') = 'read committed' THEN
        admitted := set_config('tenfold.buckets', ',' || entered::text || ',', true);
    ELSE
        PERFORM tenfold_enter(ARRAY[entered]);
    END IF;
END
$$;

-- Admission to all that this shard may write, for what serves the shard as a whole.
CREATE OR REPLACE FUNCTION tenfold_enter_every() RETURNS void
LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    FOR granule IN 0..63 LOOP
        PERFORM pg_advisory_xact_lock_shared(1413826126, granule);
    END LOOP;
    PERFORM set_config('tenfold.buckets', '*', true);
    IF to_regclass('tenfold_bucket') IS NOT NULL THEN  -- the first migration makes it
        IF EXISTS (SELECT FROM tenfold_bucket WHERE state = 'MOVING') THEN
            PERFORM set_config('tenfold.capture', '1', true);
        END IF;
    END IF;
END
$$;

-- The guard of every table with a bucket: a write that was not admitted is refused, whoever
-- writes. The trigger's WHEN has let pass what the transaction named.
CREATE OR REPLACE FUNCTION tenfold_refuse_unadmitted() RETURNS trigger
LANGUAGE plpgsql AS $$
DECLARE
    written int[] := CASE TG_OP
        WHEN 'INSERT' THEN ARRAY[NEW.bucket]
        WHEN 'DELETE' THEN ARRAY[OLD.bucket]
        ELSE ARRAY[NEW.bucket, OLD.bucket]
    END;
BEGIN
    IF current_setting('tenfold.import', true) = '1' THEN
        NULL;  -- a mover's, which has checked that the bucket is its own
    ELSIF coalesce(current_setting('tenfold.buckets', true), '') <> '*' OR EXISTS (
        SELECT FROM unnest(written) AS asked (number)
        LEFT JOIN tenfold_bucket AS held ON held.bucket = asked.number
        WHERE coalesce(held.state, 'ABSENT') NOT IN ('ACTIVE', 'MOVING')
    ) THEN
        RAISE EXCEPTION 'bucket_not_admitted: %', TG_TABLE_NAME USING ERRCODE = 'MB002',
            HINT = 'Begin the transaction with SELECT tenfold_enter(ARRAY[bucket]).';
    END IF;
    RETURN CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
END
$$;

-- What is written of such a bucket is marked, for its mover to carry over.
CREATE OR REPLACE FUNCTION tenfold_is_moving(number int) RETURNS boolean
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN EXISTS (SELECT FROM tenfold_bucket WHERE bucket = number AND state = 'MOVING');
END
$$;

-- No row trigger sees a TRUNCATE.
CREATE OR REPLACE FUNCTION tenfold_refuse_truncate() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'bucket_not_admitted: % cannot be truncated', TG_TABLE_NAME
        USING ERRCODE = 'MB002';
END
$$;

CREATE OR REPLACE FUNCTION tenfold_next_version() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('tenfold.import', true) = '1' THEN
        NULL;  -- the row comes with the version that it had
    ELSIF NEW.version = OLD.version THEN
        NEW.version := OLD.version + 1;
    ELSIF NEW.version IS DISTINCT FROM OLD.version + 1 THEN
        PERFORM tenfold_refuse('version_only_grows_by_one');
    END IF;
    RETURN NEW;
END
$$;

-- What RAISE(ABORT, rule) is on SQLite: a rule of the schema that a trigger enforces.
CREATE OR REPLACE FUNCTION tenfold_refuse(rule text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%', rule USING ERRCODE = 'check_violation', CONSTRAINT = rule;
END
$$;
