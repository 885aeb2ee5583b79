-- Accounts, transactions, entries. Sides: 1 debit, 2 credit. States: 1 open, 2 closed.

CREATE TABLE account (
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
    posted_debit bigint NOT NULL DEFAULT 0,
    posted_credit bigint NOT NULL DEFAULT 0,
    entry_count bigint NOT NULL DEFAULT 0,
    created_at_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CONSTRAINT account_bucket CHECK (bucket = tenfold_bucket_of(id)),
    CONSTRAINT account_sums CHECK (posted_debit >= 0 AND posted_credit >= 0 AND entry_count >= 0),
    CONSTRAINT account_floor CHECK (
        may_overdraw
        OR (normal_side = 2 AND posted_credit >= posted_debit)
        OR (normal_side = 1 AND posted_debit >= posted_credit))
);
CREATE INDEX account_owner ON account (bucket, tenant, owner, id);

-- Inserted after its entries, and checked against them: it is the seal.
CREATE TABLE ledger_transaction (
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
    PRIMARY KEY (bucket, id),
    CONSTRAINT ledger_transaction_bucket CHECK (bucket = tenfold_bucket_of(id))
);
CREATE UNIQUE INDEX ledger_transaction_reference ON ledger_transaction (tenant, owner, reference)
    WHERE reference IS NOT NULL;

-- Lives in its account's bucket. The foreign key is checked at the commit: entries without
-- their transaction cannot be committed.
CREATE TABLE entry (
    bucket smallint NOT NULL,
    id uuid NOT NULL,
    tenant text NOT NULL,
    owner uuid NOT NULL,
    owner_kind smallint NOT NULL CHECK (owner_kind IN (1, 2)),
    version bigint NOT NULL DEFAULT 1,
    transaction_bucket smallint NOT NULL,
    transaction_id uuid NOT NULL,
    position smallint NOT NULL CHECK (position >= 0),
    account_id uuid NOT NULL,
    account_sequence bigint NOT NULL,
    side smallint NOT NULL CHECK (side IN (1, 2)),
    currency_code text NOT NULL,
    minor_units bigint NOT NULL CONSTRAINT entry_amount CHECK (minor_units > 0),
    recorded_at_us bigint NOT NULL,
    PRIMARY KEY (bucket, id),
    CONSTRAINT entry_bucket CHECK (bucket = tenfold_bucket_of(id)),
    CONSTRAINT entry_account_bucket CHECK (bucket = tenfold_bucket_of(account_id)),
    FOREIGN KEY (bucket, account_id) REFERENCES account (bucket, id),
    FOREIGN KEY (transaction_bucket, transaction_id) REFERENCES ledger_transaction (bucket, id)
        DEFERRABLE INITIALLY DEFERRED
);
CREATE UNIQUE INDEX entry_account_once ON entry (transaction_id, account_id);
CREATE UNIQUE INDEX entry_number ON entry (bucket, account_id, account_sequence);
CREATE INDEX entry_day ON entry (tenant, recorded_at_us);
