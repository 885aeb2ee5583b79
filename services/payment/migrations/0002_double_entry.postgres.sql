-- Double entry as Postgres's triggers enforce it, whoever writes.

-- An entry joins an open account in its currency, under the next number, before the seal.
CREATE FUNCTION entry_is_allowed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    held account;
BEGIN
    -- Whoever seals or adds to this transaction takes turns, also from other connections: an
    -- entry that is not committed yet would be missing from the sums of the seal.
    PERFORM pg_advisory_xact_lock(hashtextextended(NEW.transaction_id::text, 0));
    IF EXISTS (
        SELECT FROM ledger_transaction
        WHERE bucket = NEW.transaction_bucket AND id = NEW.transaction_id
    ) THEN
        PERFORM tenfold_refuse('transaction_sealed');
    END IF;
    SELECT * INTO held FROM account
    WHERE bucket = NEW.bucket AND id = NEW.account_id AND tenant = NEW.tenant
        AND owner = NEW.owner AND owner_kind = NEW.owner_kind
    FOR UPDATE;
    IF NOT FOUND THEN
        PERFORM tenfold_refuse('account_missing');
    ELSIF held.state <> 1 THEN
        PERFORM tenfold_refuse('account_closed');
    ELSIF held.currency_code <> NEW.currency_code THEN
        PERFORM tenfold_refuse('currency_mismatch');
    ELSIF held.entry_count + 1 <> NEW.account_sequence THEN
        PERFORM tenfold_refuse('account_sequence_gap');
    ELSIF (CASE NEW.side WHEN 1 THEN held.posted_debit ELSE held.posted_credit END)::numeric
            + NEW.minor_units > 9223372036854775807 THEN
        PERFORM tenfold_refuse('balance_overflow');
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER entry_is_allowed BEFORE INSERT ON entry
    FOR EACH ROW EXECUTE FUNCTION entry_is_allowed();

CREATE FUNCTION entry_moves_balance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE account SET
        posted_debit = posted_debit + CASE NEW.side WHEN 1 THEN NEW.minor_units ELSE 0 END,
        posted_credit = posted_credit + CASE NEW.side WHEN 2 THEN NEW.minor_units ELSE 0 END,
        entry_count = NEW.account_sequence
    WHERE bucket = NEW.bucket AND id = NEW.account_id;
    RETURN NULL;
END
$$;
CREATE TRIGGER entry_moves_balance AFTER INSERT ON entry
    FOR EACH ROW EXECUTE FUNCTION entry_moves_balance();

-- A trigger that refuses under the rule that it is given.
CREATE FUNCTION refuse_by_rule() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM tenfold_refuse(TG_ARGV[0]);
    RETURN NULL;
END
$$;
CREATE TRIGGER entry_is_kept BEFORE DELETE ON entry
    FOR EACH ROW EXECUTE FUNCTION refuse_by_rule('entries_are_append_only');
CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry
    FOR EACH ROW EXECUTE FUNCTION refuse_by_rule('entries_are_append_only');

-- The seal fits the entries that are there: two or more, all of the tenant and the moment,
-- balanced per currency.
CREATE FUNCTION transaction_is_balanced() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    fitting bigint;
    present bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtextextended(NEW.id::text, 0));
    SELECT count(*) FILTER (
            WHERE transaction_bucket = NEW.bucket AND tenant = NEW.tenant
                AND recorded_at_us = NEW.recorded_at_us),
        count(*)
    INTO fitting, present FROM entry WHERE transaction_id = NEW.id;
    IF NEW.entry_count < 2 OR NEW.entry_count <> fitting OR NEW.entry_count <> present THEN
        PERFORM tenfold_refuse('entries_missing');
    END IF;
    IF EXISTS (
        SELECT FROM entry WHERE transaction_id = NEW.id GROUP BY currency_code
        HAVING sum(CASE side WHEN 1 THEN minor_units ELSE -minor_units END) <> 0
    ) THEN
        PERFORM tenfold_refuse('entries_unbalanced');
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER transaction_is_balanced BEFORE INSERT ON ledger_transaction
    FOR EACH ROW EXECUTE FUNCTION transaction_is_balanced();
CREATE TRIGGER transaction_is_kept BEFORE DELETE ON ledger_transaction
    FOR EACH ROW EXECUTE FUNCTION refuse_by_rule('transactions_are_append_only');
CREATE TRIGGER transaction_is_fixed BEFORE UPDATE ON ledger_transaction
    FOR EACH ROW EXECUTE FUNCTION refuse_by_rule('transactions_are_append_only');

-- An account starts empty; its sums move with an entry and in no other way.
CREATE TRIGGER account_starts_empty BEFORE INSERT ON account
    FOR EACH ROW
    WHEN (NEW.posted_debit <> 0 OR NEW.posted_credit <> 0 OR NEW.entry_count <> 0)
    EXECUTE FUNCTION refuse_by_rule('account_starts_empty');
CREATE TRIGGER account_is_fixed BEFORE UPDATE ON account
    FOR EACH ROW
    WHEN ((NEW.bucket, NEW.id, NEW.tenant, NEW.owner, NEW.owner_kind, NEW.currency_code,
            NEW.exponent, NEW.normal_side, NEW.may_overdraw, NEW.created_at_us)
        IS DISTINCT FROM (OLD.bucket, OLD.id, OLD.tenant, OLD.owner, OLD.owner_kind,
            OLD.currency_code, OLD.exponent, OLD.normal_side, OLD.may_overdraw, OLD.created_at_us))
    EXECUTE FUNCTION refuse_by_rule('account_is_fixed');

CREATE FUNCTION account_sums_follow_entries() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM entry
        WHERE bucket = OLD.bucket AND account_id = OLD.id
            AND account_sequence = OLD.entry_count + 1
            AND NEW.entry_count = OLD.entry_count + 1
            AND NEW.posted_debit - OLD.posted_debit
                = CASE side WHEN 1 THEN minor_units ELSE 0 END
            AND NEW.posted_credit - OLD.posted_credit
                = CASE side WHEN 2 THEN minor_units ELSE 0 END
    ) THEN
        PERFORM tenfold_refuse('balances_follow_entries');
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER account_sums_follow_entries BEFORE UPDATE ON account
    FOR EACH ROW
    WHEN ((NEW.posted_debit, NEW.posted_credit, NEW.entry_count)
        IS DISTINCT FROM (OLD.posted_debit, OLD.posted_credit, OLD.entry_count))
    EXECUTE FUNCTION account_sums_follow_entries();
CREATE TRIGGER account_is_kept BEFORE DELETE ON account
    FOR EACH ROW EXECUTE FUNCTION refuse_by_rule('accounts_are_kept');
