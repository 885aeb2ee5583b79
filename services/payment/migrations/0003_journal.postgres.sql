-- A journal that is written in batches. An account's sums are those of its last entry, so moving
-- money adds rows and changes none; a transaction knows its own entries; what was refused is kept
-- under its id. Rules are checked once for all rows of a statement, by key, so whoever writes brings
-- transactions and entries in one statement.

DROP TRIGGER entry_is_allowed ON entry;
DROP TRIGGER entry_moves_balance ON entry;
DROP TRIGGER entry_is_fixed ON entry;
DROP TRIGGER transaction_is_balanced ON ledger_transaction;
DROP TRIGGER transaction_is_fixed ON ledger_transaction;
DROP TRIGGER account_starts_empty ON account;
DROP TRIGGER account_is_fixed ON account;
DROP TRIGGER account_sums_follow_entries ON account;
DROP FUNCTION entry_is_allowed, entry_moves_balance, transaction_is_balanced,
    account_sums_follow_entries;

-- state: 1 posted, 2 held, 3 a hold that was posted, 4 voided, 5 expired, 6 refused.
-- result: why it was refused; 0 if it was not. account_id, account_sequence: one of its entries, in
-- its own bucket. entries: [[account, side, currency, minor units, number in the account, held minor
-- units, owner's kind, owner], ...].
ALTER TABLE ledger_transaction
    ADD COLUMN state smallint NOT NULL DEFAULT 1 CHECK (state BETWEEN 1 AND 6),
    ADD COLUMN result smallint NOT NULL DEFAULT 0,
    ADD COLUMN fingerprint bytea NOT NULL DEFAULT '',
    ADD COLUMN account_id uuid,
    ADD COLUMN account_sequence bigint,
    ADD COLUMN entries text NOT NULL DEFAULT '[]',
    ADD COLUMN pending_id uuid,
    ADD COLUMN expires_at_us bigint;

-- posted_*, pending_*: the account's sums after this entry. floor_side: the side that must not be
-- outweighed, 0 for an account that may be overdrawn.
ALTER TABLE entry
    ADD COLUMN held_minor_units bigint NOT NULL DEFAULT 0,
    ADD COLUMN posted_debit bigint NOT NULL DEFAULT 0,
    ADD COLUMN posted_credit bigint NOT NULL DEFAULT 0,
    ADD COLUMN pending_debit bigint NOT NULL DEFAULT 0,
    ADD COLUMN pending_credit bigint NOT NULL DEFAULT 0,
    ADD COLUMN floor_side smallint NOT NULL DEFAULT 0;

UPDATE entry SET posted_debit = sums.debit, posted_credit = sums.credit,
    floor_side = CASE WHEN account.may_overdraw THEN 0 ELSE account.normal_side END
FROM account, (
    SELECT bucket, account_id, account_sequence,
        sum(CASE side WHEN 1 THEN minor_units ELSE 0 END) OVER line AS debit,
        sum(CASE side WHEN 2 THEN minor_units ELSE 0 END) OVER line AS credit
    FROM entry WINDOW line AS (PARTITION BY bucket, account_id ORDER BY account_sequence)
) AS sums
WHERE entry.bucket = sums.bucket AND entry.account_id = sums.account_id
    AND entry.account_sequence = sums.account_sequence
    AND account.bucket = entry.bucket AND account.id = entry.account_id;
UPDATE ledger_transaction SET entries = made.entries FROM (
    SELECT transaction_id, json_agg(json_build_array(account_id, side, currency_code, minor_units,
        account_sequence, 0, owner_kind, owner) ORDER BY position)::text AS entries
    FROM entry GROUP BY transaction_id
) AS made
WHERE ledger_transaction.id = made.transaction_id;
UPDATE ledger_transaction SET account_id = entry.account_id,
    account_sequence = entry.account_sequence
FROM entry
WHERE entry.transaction_id = ledger_transaction.id AND entry.bucket = ledger_transaction.bucket;
SET CONSTRAINTS ALL IMMEDIATE;

ALTER TABLE account
    DROP COLUMN posted_debit,
    DROP COLUMN posted_credit,
    DROP COLUMN entry_count;
ALTER TABLE ledger_transaction
    ALTER COLUMN state DROP DEFAULT,
    ALTER COLUMN entries DROP DEFAULT,
    ADD CONSTRAINT transaction_result CHECK ((result = 0) = (state <> 6)),
    ADD CONSTRAINT entries_missing CHECK (
        CASE state WHEN 6 THEN entry_count = 0 ELSE entry_count >= 2 END
        AND (state = 6) = (account_id IS NULL));
CREATE INDEX ledger_transaction_expiry ON ledger_transaction (expires_at_us) WHERE state = 2;
ALTER TABLE entry
    DROP CONSTRAINT entry_pkey,
    DROP CONSTRAINT entry_bucket,
    DROP CONSTRAINT entry_amount,
    DROP CONSTRAINT entry_bucket_account_id_fkey,
    DROP CONSTRAINT entry_transaction_bucket_transaction_id_fkey,
    DROP COLUMN id,
    DROP COLUMN position,
    ALTER COLUMN floor_side DROP DEFAULT,
    ADD CONSTRAINT entry_amount CHECK (
        minor_units >= 0 AND (minor_units > 0 OR held_minor_units <> 0)),
    ADD CONSTRAINT account_sums CHECK (
        posted_debit >= 0 AND posted_credit >= 0 AND pending_debit >= 0 AND pending_credit >= 0),
    ADD CONSTRAINT account_floor CHECK (
        floor_side = 0
        OR (floor_side = 2 AND posted_credit - pending_debit >= posted_debit)
        OR (floor_side = 1 AND posted_debit - pending_credit >= posted_credit));
DROP INDEX entry_account_once, entry_number, entry_day;
ALTER TABLE entry ADD PRIMARY KEY (bucket, account_id, account_sequence);
-- Rows lie in the order of their time, so a note per range of pages is enough to find a day.
CREATE INDEX entry_day ON entry USING brin (recorded_at_us);

-- Every entry is one of a transaction of this very database transaction, together they balance
-- per currency, and each goes on from its account's last. A connection keeps a function's plans,
-- and the first may be made on empty tables: so they are told to look rows up by key.
CREATE FUNCTION entries_are_even() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off AS $$
DECLARE
    broken text;
BEGIN
    SELECT CASE
        WHEN made.debit <> 0 OR made.held <> 0 THEN 'entries_unbalanced'
        WHEN held.id IS NULL THEN 'transaction_missing'
        WHEN held.xmin <> pg_current_xact_id()::xid THEN 'transaction_sealed'
        ELSE 'entries_missing' END
    INTO broken
    FROM (
        SELECT transaction_bucket, transaction_id,
            sum(count(*)) OVER (PARTITION BY transaction_bucket, transaction_id) AS present,
            sum(CASE side WHEN 1 THEN minor_units ELSE -minor_units END) AS debit,
            sum(CASE side WHEN 1 THEN held_minor_units ELSE -held_minor_units END) AS held
        FROM fresh GROUP BY transaction_bucket, transaction_id, currency_code
    ) AS made
    LEFT JOIN ledger_transaction AS held
        ON held.bucket = made.transaction_bucket AND held.id = made.transaction_id
    WHERE made.debit <> 0 OR made.held <> 0 OR held.id IS NULL
        OR held.xmin <> pg_current_xact_id()::xid OR held.entry_count <> made.present
    LIMIT 1;
    IF FOUND THEN
        PERFORM tenfold_refuse(broken);
    END IF;
    SELECT CASE
        WHEN account.id IS NULL THEN 'account_missing'
        WHEN account.state <> 1 AND fresh.held_minor_units >= 0 THEN 'account_closed'
        WHEN account.currency_code <> fresh.currency_code THEN 'currency_mismatch'
        WHEN fresh.account_sequence <> coalesce(before.account_sequence, 0) + 1
            THEN 'account_sequence_gap'
        ELSE 'balances_follow_entries' END
    INTO broken
    FROM fresh
    LEFT JOIN account ON account.bucket = fresh.bucket AND account.id = fresh.account_id
        AND account.tenant = fresh.tenant AND account.owner = fresh.owner
        AND account.owner_kind = fresh.owner_kind
    LEFT JOIN entry AS before ON before.bucket = fresh.bucket
        AND before.account_id = fresh.account_id
        AND before.account_sequence = fresh.account_sequence - 1
    WHERE account.id IS NULL
        OR (account.state <> 1 AND fresh.held_minor_units >= 0)
        OR account.currency_code <> fresh.currency_code
        OR fresh.account_sequence <> coalesce(before.account_sequence, 0) + 1
        OR fresh.floor_side <> CASE WHEN account.may_overdraw THEN 0 ELSE account.normal_side END
        OR fresh.posted_debit - coalesce(before.posted_debit, 0)
            <> CASE fresh.side WHEN 1 THEN fresh.minor_units ELSE 0 END
        OR fresh.posted_credit - coalesce(before.posted_credit, 0)
            <> CASE fresh.side WHEN 2 THEN fresh.minor_units ELSE 0 END
        OR fresh.pending_debit - coalesce(before.pending_debit, 0)
            <> CASE fresh.side WHEN 1 THEN fresh.held_minor_units ELSE 0 END
        OR fresh.pending_credit - coalesce(before.pending_credit, 0)
            <> CASE fresh.side WHEN 2 THEN fresh.held_minor_units ELSE 0 END
    LIMIT 1;
    IF FOUND THEN
        PERFORM tenfold_refuse(broken);
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER entries_are_even AFTER INSERT ON entry
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT EXECUTE FUNCTION entries_are_even();
CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry
    FOR EACH ROW EXECUTE FUNCTION refuse_by_rule('entries_are_append_only');

-- One of a transaction's entries proves the others: they came in one statement and were counted.
CREATE FUNCTION transactions_have_entries() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off AS $$
BEGIN
    IF EXISTS (
        SELECT FROM fresh
        LEFT JOIN entry ON entry.bucket = fresh.bucket AND entry.account_id = fresh.account_id
            AND entry.account_sequence = fresh.account_sequence
        WHERE fresh.state <> 6 AND (entry.transaction_id IS DISTINCT FROM fresh.id
            OR entry.tenant <> fresh.tenant OR entry.recorded_at_us <> fresh.recorded_at_us)
    ) THEN
        PERFORM tenfold_refuse('entries_missing');
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER transactions_have_entries AFTER INSERT ON ledger_transaction
    REFERENCING NEW TABLE AS fresh FOR EACH STATEMENT
    EXECUTE FUNCTION transactions_have_entries();

-- A hold ends once; nothing else of a transaction changes.
CREATE FUNCTION holds_end_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state <> 2 OR NEW.state NOT IN (3, 4, 5)
        OR to_jsonb(NEW) - '{state,version}'::text[] <> to_jsonb(OLD) - '{state,version}'::text[]
    THEN
        PERFORM tenfold_refuse('transactions_are_append_only');
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER transaction_is_fixed BEFORE UPDATE ON ledger_transaction
    FOR EACH ROW EXECUTE FUNCTION holds_end_once();
CREATE TRIGGER account_is_fixed BEFORE UPDATE ON account
    FOR EACH ROW
    WHEN ((NEW.bucket, NEW.id, NEW.tenant, NEW.owner, NEW.owner_kind, NEW.currency_code,
            NEW.exponent, NEW.normal_side, NEW.may_overdraw, NEW.created_at_us)
        IS DISTINCT FROM (OLD.bucket, OLD.id, OLD.tenant, OLD.owner, OLD.owner_kind,
            OLD.currency_code, OLD.exponent, OLD.normal_side, OLD.may_overdraw, OLD.created_at_us))
    EXECUTE FUNCTION refuse_by_rule('account_is_fixed');

-- What a batch begins with: nobody else decides on money of these granules of buckets until it
-- ends. One order of locks, so two batches never wait for each other.
CREATE FUNCTION lane_enter(granules int[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    granule int;
BEGIN
    FOREACH granule IN ARRAY granules LOOP
        PERFORM pg_advisory_xact_lock(1279348293, granule);
    END LOOP;
    PERFORM set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
        set_config('enable_mergejoin', 'off', true), set_config('enable_bitmapscan', 'off', true);
END
$$;
