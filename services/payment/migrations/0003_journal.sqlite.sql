-- The journal of 0003_journal.postgres.sql. Here entries come first, one after the other, and the
-- transaction after them is their seal: entries without it cannot be committed. A table cannot
-- lose its key, so they are made anew.

DROP TRIGGER entry_is_allowed;
DROP TRIGGER entry_moves_balance;
DROP TRIGGER entry_is_kept;
DROP TRIGGER entry_is_fixed;
DROP TRIGGER transaction_is_balanced;
DROP TRIGGER transaction_is_kept;
DROP TRIGGER transaction_is_fixed;
DROP TRIGGER account_starts_empty;
DROP TRIGGER account_is_fixed;
DROP TRIGGER account_sums_follow_entries;
DROP TRIGGER account_is_kept;

CREATE TABLE entry_next (
    bucket smallint NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    owner_kind smallint NOT NULL CHECK (owner_kind IN (1, 2)),
    version bigint NOT NULL DEFAULT 1,
    transaction_bucket smallint NOT NULL,
    transaction_id uuid NOT NULL,
    account_id uuid NOT NULL,
    account_sequence bigint NOT NULL,
    side smallint NOT NULL CHECK (side IN (1, 2)),
    currency_code text NOT NULL,
    minor_units bigint NOT NULL,
    recorded_at_us bigint NOT NULL,
    held_minor_units bigint NOT NULL,
    posted_debit bigint NOT NULL,
    posted_credit bigint NOT NULL,
    pending_debit bigint NOT NULL,
    pending_credit bigint NOT NULL,
    floor_side smallint NOT NULL,
    PRIMARY KEY (bucket, account_id, account_sequence),
    CONSTRAINT entry_account_bucket CHECK (bucket = tenfold_bucket_of(account_id)),
    CONSTRAINT entry_amount CHECK (
        minor_units >= 0 AND (minor_units > 0 OR held_minor_units <> 0)),
    CONSTRAINT account_sums CHECK (
        posted_debit >= 0 AND posted_credit >= 0 AND pending_debit >= 0 AND pending_credit >= 0),
    CONSTRAINT account_floor CHECK (
        floor_side = 0
        OR (floor_side = 2 AND posted_credit - pending_debit >= posted_debit)
        OR (floor_side = 1 AND posted_debit - pending_credit >= posted_credit)),
    FOREIGN KEY (transaction_bucket, transaction_id) REFERENCES transaction_next (bucket, id)
        DEFERRABLE INITIALLY DEFERRED
);
INSERT INTO entry_next
SELECT entry.bucket, entry.tenant, entry.owner, entry.owner_kind, 1, transaction_bucket,
    transaction_id, account_id, account_sequence, side, entry.currency_code, minor_units,
    recorded_at_us, 0,
    sum(CASE side WHEN 1 THEN minor_units ELSE 0 END) OVER line,
    sum(CASE side WHEN 2 THEN minor_units ELSE 0 END) OVER line,
    0, 0, CASE WHEN account.may_overdraw THEN 0 ELSE account.normal_side END
FROM entry JOIN account ON account.bucket = entry.bucket AND account.id = entry.account_id
WINDOW line AS (PARTITION BY entry.bucket, account_id ORDER BY account_sequence);

CREATE TABLE transaction_next (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    owner_kind smallint NOT NULL CHECK (owner_kind IN (1, 2)),
    version bigint NOT NULL DEFAULT 1,
    reference text CHECK (length(reference) > 0),
    description text NOT NULL,
    entry_count bigint NOT NULL,
    recorded_at_us bigint NOT NULL,
    state smallint NOT NULL CHECK (state BETWEEN 1 AND 6),
    result smallint NOT NULL,
    fingerprint bytea NOT NULL,
    account_id uuid,
    account_sequence bigint,
    entries text NOT NULL,
    pending_id uuid,
    expires_at_us bigint,
    PRIMARY KEY (bucket, id),
    CONSTRAINT ledger_transaction_bucket CHECK (bucket = tenfold_bucket_of(id)),
    CONSTRAINT transaction_result CHECK ((result = 0) = (state <> 6)),
    CONSTRAINT entries_missing CHECK (
        CASE state WHEN 6 THEN entry_count = 0 ELSE entry_count >= 2 END
        AND (state = 6) = (account_id IS NULL))
);
INSERT INTO transaction_next
SELECT t.bucket, t.id, t.tenant, t.owner, t.owner_kind, t.version, t.reference, t.description,
    t.entry_count, t.recorded_at_us, 1, 0, x'', anchor.account_id, anchor.account_sequence,
    (SELECT json_group_array(json_array(lower(hex(line.account_id)), line.side, line.currency_code,
            line.minor_units, line.account_sequence, 0, line.owner_kind, lower(hex(line.owner))))
        FROM (SELECT * FROM entry WHERE transaction_id = t.id ORDER BY position) AS line),
    NULL, NULL
FROM ledger_transaction AS t
JOIN entry AS anchor ON anchor.transaction_id = t.id AND anchor.bucket = t.bucket
GROUP BY t.bucket, t.id;

CREATE TABLE account_next (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    owner_kind smallint NOT NULL CHECK (owner_kind IN (1, 2)),
    version bigint NOT NULL DEFAULT 1,
    currency_code text NOT NULL CHECK (length(currency_code) = 3),
    exponent smallint NOT NULL CHECK (exponent BETWEEN 0 AND 4),
    normal_side smallint NOT NULL CHECK (normal_side IN (1, 2)),
    may_overdraw boolean NOT NULL,
    display_name text NOT NULL,
    state smallint NOT NULL CHECK (state IN (1, 2)),
    created_at_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CONSTRAINT account_bucket CHECK (bucket = tenfold_bucket_of(id))
);
INSERT INTO account_next
SELECT bucket, id, tenant, owner, owner_kind, version, currency_code, exponent, normal_side,
    may_overdraw, display_name, state, created_at_us FROM account;

DROP TABLE entry;
DROP TABLE ledger_transaction;
DROP TABLE account;
ALTER TABLE entry_next RENAME TO entry;
ALTER TABLE transaction_next RENAME TO ledger_transaction;
ALTER TABLE account_next RENAME TO account;
CREATE INDEX entry_transaction ON entry (transaction_id);
CREATE INDEX entry_day ON entry (tenant, recorded_at_us);
CREATE UNIQUE INDEX ledger_transaction_reference ON ledger_transaction (tenant, owner, reference)
    WHERE reference IS NOT NULL;
CREATE INDEX ledger_transaction_expiry ON ledger_transaction (expires_at_us) WHERE state = 2;
CREATE INDEX account_owner ON account (bucket, tenant, owner, id);

-- An entry joins an open account in its currency, goes on from the last, and comes before the seal.
CREATE TRIGGER entry_is_allowed BEFORE INSERT ON entry BEGIN
    SELECT RAISE(ABORT, 'entry_not_an_integer')
        WHERE typeof(NEW.minor_units) <> 'integer' OR typeof(NEW.held_minor_units) <> 'integer';
    SELECT RAISE(ABORT, 'transaction_sealed') WHERE EXISTS (
        SELECT 1 FROM ledger_transaction
        WHERE bucket = NEW.transaction_bucket AND id = NEW.transaction_id);
    SELECT RAISE(ABORT, 'account_missing') WHERE NOT EXISTS (
        SELECT 1 FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id AND tenant = NEW.tenant
            AND owner = NEW.owner AND owner_kind = NEW.owner_kind);
    SELECT RAISE(ABORT, 'account_closed') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id AND state <> 1
            AND NEW.held_minor_units >= 0;
    SELECT RAISE(ABORT, 'currency_mismatch') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id AND currency_code <> NEW.currency_code;
    SELECT RAISE(ABORT, 'account_sequence_gap') WHERE NEW.account_sequence <> 1 + coalesce(
        (SELECT account_sequence FROM entry
        WHERE bucket = NEW.bucket AND account_id = NEW.account_id
        ORDER BY account_sequence DESC LIMIT 1), 0);
    SELECT RAISE(ABORT, 'balances_follow_entries') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id
            AND NEW.floor_side <> CASE WHEN may_overdraw THEN 0 ELSE normal_side END;
    SELECT RAISE(ABORT, 'balances_follow_entries')
    FROM (SELECT 1) LEFT JOIN entry AS before ON before.bucket = NEW.bucket
        AND before.account_id = NEW.account_id
        AND before.account_sequence = NEW.account_sequence - 1
    WHERE NEW.posted_debit - coalesce(before.posted_debit, 0)
            <> CASE NEW.side WHEN 1 THEN NEW.minor_units ELSE 0 END
        OR NEW.posted_credit - coalesce(before.posted_credit, 0)
            <> CASE NEW.side WHEN 2 THEN NEW.minor_units ELSE 0 END
        OR NEW.pending_debit - coalesce(before.pending_debit, 0)
            <> CASE NEW.side WHEN 1 THEN NEW.held_minor_units ELSE 0 END
        OR NEW.pending_credit - coalesce(before.pending_credit, 0)
            <> CASE NEW.side WHEN 2 THEN NEW.held_minor_units ELSE 0 END;
END;
CREATE TRIGGER entry_is_kept BEFORE DELETE ON entry BEGIN
    SELECT RAISE(ABORT, 'entries_are_append_only');
END;
CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry BEGIN
    SELECT RAISE(ABORT, 'entries_are_append_only');
END;

-- The seal fits the entries that are there: all of the tenant and the moment, balanced per currency.
CREATE TRIGGER transaction_is_balanced BEFORE INSERT ON ledger_transaction BEGIN
    SELECT RAISE(ABORT, 'entries_missing') WHERE NEW.entry_count <> (
        SELECT count(*) FROM entry
        WHERE transaction_id = NEW.id AND transaction_bucket = NEW.bucket
            AND tenant = NEW.tenant AND recorded_at_us = NEW.recorded_at_us);
    SELECT RAISE(ABORT, 'entries_unbalanced') WHERE EXISTS (
        SELECT 1 FROM entry WHERE transaction_id = NEW.id AND transaction_bucket = NEW.bucket
        GROUP BY currency_code
        HAVING sum(CASE side WHEN 1 THEN minor_units ELSE -minor_units END) <> 0
            OR sum(CASE side WHEN 1 THEN held_minor_units ELSE -held_minor_units END) <> 0);
END;
CREATE TRIGGER transaction_is_kept BEFORE DELETE ON ledger_transaction BEGIN
    SELECT RAISE(ABORT, 'transactions_are_append_only');
END;
-- A hold ends once; nothing else of a transaction changes, save the number of its version.
CREATE TRIGGER transaction_is_fixed BEFORE UPDATE ON ledger_transaction
WHEN NEW.bucket <> OLD.bucket OR NEW.id <> OLD.id OR NEW.tenant <> OLD.tenant
    OR NEW.owner <> OLD.owner OR NEW.owner_kind <> OLD.owner_kind
    OR NEW.reference IS NOT OLD.reference OR NEW.description <> OLD.description
    OR NEW.entry_count <> OLD.entry_count OR NEW.recorded_at_us <> OLD.recorded_at_us
    OR NEW.result <> OLD.result OR NEW.fingerprint <> OLD.fingerprint
    OR NEW.account_id IS NOT OLD.account_id OR NEW.account_sequence IS NOT OLD.account_sequence
    OR NEW.entries <> OLD.entries OR NEW.pending_id IS NOT OLD.pending_id
    OR NEW.expires_at_us IS NOT OLD.expires_at_us
    OR (NEW.version = OLD.version AND (OLD.state <> 2 OR NEW.state NOT IN (3, 4, 5)))
    OR (NEW.version <> OLD.version AND NEW.state <> OLD.state)
BEGIN
    SELECT RAISE(ABORT, 'transactions_are_append_only');
END;
CREATE TRIGGER account_is_fixed BEFORE UPDATE ON account
WHEN NEW.bucket <> OLD.bucket OR NEW.id <> OLD.id OR NEW.tenant <> OLD.tenant
    OR NEW.owner <> OLD.owner OR NEW.owner_kind <> OLD.owner_kind
    OR NEW.currency_code <> OLD.currency_code OR NEW.exponent <> OLD.exponent
    OR NEW.normal_side <> OLD.normal_side OR NEW.may_overdraw <> OLD.may_overdraw
    OR NEW.created_at_us <> OLD.created_at_us
BEGIN
    SELECT RAISE(ABORT, 'account_is_fixed');
END;
CREATE TRIGGER account_is_kept BEFORE DELETE ON account BEGIN
    SELECT RAISE(ABORT, 'accounts_are_kept');
END;
