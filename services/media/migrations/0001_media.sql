-- Uploads and videos, each in its owner's bucket.

-- committed_bytes: the offset, the only truth about it. writer_token: the newest writer's.
CREATE TABLE upload (
  bucket smallint NOT NULL,
  id uuid NOT NULL,
  tenant text NOT NULL,
  owner uuid NOT NULL,
  version bigint NOT NULL,
  size_bytes bigint NOT NULL CHECK (size_bytes > 0),
  committed_bytes bigint NOT NULL,
  mime_type text NOT NULL,
  display_name text NOT NULL,
  tus_metadata text NOT NULL,
  state text NOT NULL CHECK (state IN ('OPEN', 'COMPLETED', 'TERMINATED', 'EXPIRED')),
  video_id uuid,
  writer_token bigint NOT NULL,
  created_at_us bigint NOT NULL,
  expires_at_us bigint NOT NULL,
  PRIMARY KEY (bucket, id),
  CHECK (bucket = tenfold_bucket_of(id)),
  CHECK (committed_bytes BETWEEN 0 AND size_bytes),
  -- An OPEN upload never has every byte: the last one completes it in the same commit.
  CHECK (state <> 'OPEN' OR committed_bytes < size_bytes),
  CHECK ((state = 'COMPLETED') = (video_id IS NOT NULL))
);

CREATE INDEX upload_open ON upload (expires_at_us) WHERE state = 'OPEN';
CREATE INDEX upload_open_of_owner ON upload (bucket, tenant, owner) WHERE state = 'OPEN';
CREATE INDEX upload_ended ON upload (expires_at_us) WHERE state IN ('TERMINATED', 'EXPIRED');

-- job_token: the newest worker's, only it changes the row; output_token: the folder that is
-- played, 0 for none. source, renditions: JSON; '' and '[]' until they are known.
CREATE TABLE video (
  bucket smallint NOT NULL,
  id uuid NOT NULL,
  tenant text NOT NULL,
  owner uuid NOT NULL,
  version bigint NOT NULL,
  upload_id uuid NOT NULL,
  display_name text NOT NULL,
  state text NOT NULL CHECK (
    state IN ('QUEUED', 'PROBING', 'TRANSCODING', 'READY', 'FAILED', 'DELETED')),
  size_bytes bigint NOT NULL,
  sha256 text NOT NULL,
  source text NOT NULL,
  renditions text NOT NULL,
  progress_percent bigint NOT NULL CHECK (progress_percent BETWEEN 0 AND 100),
  failure_reason text NOT NULL,
  failure_description text NOT NULL,
  failure_is_retryable smallint NOT NULL,
  job_token bigint NOT NULL,
  lease_ends_at_us bigint,
  failure_count bigint NOT NULL,
  claim_count bigint NOT NULL,
  output_token bigint NOT NULL,
  created_at_us bigint NOT NULL,
  changed_at_us bigint NOT NULL,
  ready_at_us bigint,
  PRIMARY KEY (bucket, id),
  CHECK (bucket = tenfold_bucket_of(id)),
  -- One video per upload, whoever completes it.
  UNIQUE (bucket, upload_id),
  CHECK ((state = 'FAILED') = (failure_reason <> '')),
  CHECK ((state = 'READY') = (output_token <> 0))
);

CREATE INDEX video_newest ON video (bucket, tenant, owner, id) WHERE state <> 'DELETED';
CREATE INDEX video_unfinished ON video (changed_at_us)
  WHERE state IN ('QUEUED', 'PROBING', 'TRANSCODING');
