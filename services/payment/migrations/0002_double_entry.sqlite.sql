-- Double entry as SQLite's triggers enforce it, whoever writes.

-- An entry joins an open account in its currency, under the next number, before the seal.
CREATE TRIGGER entry_is_allowed BEFORE INSERT ON entry BEGIN
    SELECT RAISE(ABORT, 'entry_not_an_integer') WHERE typeof(NEW.minor_units) <> 'integer';
    SELECT RAISE(ABORT, 'transaction_sealed') WHERE EXISTS (
        SELECT 1 FROM ledger_transaction
        WHERE bucket = NEW.transaction_bucket AND id = NEW.transaction_id);
    SELECT RAISE(ABORT, 'account_missing') WHERE NOT EXISTS (
        SELECT 1 FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id AND tenant = NEW.tenant
            AND owner = NEW.owner AND owner_kind = NEW.owner_kind);
    SELECT RAISE(ABORT, 'account_closed') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id AND state <> 1;
    SELECT RAISE(ABORT, 'currency_mismatch') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id AND currency_code <> NEW.currency_code;
    SELECT RAISE(ABORT, 'account_sequence_gap') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id
            AND entry_count + 1 <> NEW.account_sequence;
    -- A sum beyond int64 would silently become a float.
    SELECT RAISE(ABORT, 'balance_overflow') FROM account
        WHERE bucket = NEW.bucket AND id = NEW.account_id
            AND CASE NEW.side WHEN 1 THEN posted_debit ELSE posted_credit END
                > 9223372036854775807 - NEW.minor_units;
END;

CREATE TRIGGER entry_moves_balance AFTER INSERT ON entry BEGIN
    UPDATE account SET
        posted_debit = posted_debit + CASE NEW.side WHEN 1 THEN NEW.minor_units ELSE 0 END,
        posted_credit = posted_credit + CASE NEW.side WHEN 2 THEN NEW.minor_units ELSE 0 END,
        entry_count = NEW.account_sequence
    WHERE bucket = NEW.bucket AND id = NEW.account_id;
END;

CREATE TRIGGER entry_is_kept BEFORE DELETE ON entry BEGIN
    SELECT RAISE(ABORT, 'entries_are_append_only');
END;
CREATE TRIGGER entry_is_fixed BEFORE UPDATE ON entry BEGIN
    SELECT RAISE(ABORT, 'entries_are_append_only');
END;

-- The seal fits the entries that are there: two or more, all of the tenant and the moment,
-- balanced per currency.
CREATE TRIGGER transaction_is_balanced BEFORE INSERT ON ledger_transaction BEGIN
    SELECT RAISE(ABORT, 'entries_missing') WHERE NEW.entry_count < 2 OR NEW.entry_count <> (
        SELECT count(*) FROM entry
        WHERE transaction_id = NEW.id AND transaction_bucket = NEW.bucket
            AND tenant = NEW.tenant AND recorded_at_us = NEW.recorded_at_us);
    SELECT RAISE(ABORT, 'entries_missing') WHERE NEW.entry_count <> (
        SELECT count(*) FROM entry WHERE transaction_id = NEW.id);
    SELECT RAISE(ABORT, 'entries_unbalanced') WHERE EXISTS (
        SELECT 1 FROM entry WHERE transaction_id = NEW.id GROUP BY currency_code
        HAVING sum(CASE side WHEN 1 THEN minor_units ELSE -minor_units END) <> 0);
END;
CREATE TRIGGER transaction_is_kept BEFORE DELETE ON ledger_transaction BEGIN
    SELECT RAISE(ABORT, 'transactions_are_append_only');
END;
CREATE TRIGGER transaction_is_fixed BEFORE UPDATE ON ledger_transaction BEGIN
    SELECT RAISE(ABORT, 'transactions_are_append_only');
END;

-- An account starts empty; its sums move with an entry and in no other way.
CREATE TRIGGER account_starts_empty BEFORE INSERT ON account BEGIN
    SELECT RAISE(ABORT, 'account_starts_empty')
        WHERE NEW.posted_debit <> 0 OR NEW.posted_credit <> 0 OR NEW.entry_count <> 0;
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
CREATE TRIGGER account_sums_follow_entries BEFORE UPDATE ON account
WHEN NEW.posted_debit IS NOT OLD.posted_debit OR NEW.posted_credit IS NOT OLD.posted_credit
    OR NEW.entry_count IS NOT OLD.entry_count
BEGIN
    SELECT RAISE(ABORT, 'balances_follow_entries') WHERE NOT EXISTS (
        SELECT 1 FROM entry
        WHERE bucket = OLD.bucket AND account_id = OLD.id
            AND account_sequence = OLD.entry_count + 1
            AND NEW.entry_count = OLD.entry_count + 1
            AND NEW.posted_debit - OLD.posted_debit
                = CASE side WHEN 1 THEN minor_units ELSE 0 END
            AND NEW.posted_credit - OLD.posted_credit
                = CASE side WHEN 2 THEN minor_units ELSE 0 END);
END;
CREATE TRIGGER account_is_kept BEFORE DELETE ON account BEGIN
    SELECT RAISE(ABORT, 'accounts_are_kept');
END;
