"""Media: resumable uploads, videos, their transcoding and playback.

Owns uploads and videos, each in its owner's bucket, and their bytes below the data
folder. Serves tenfold.media.v1 (UploadService, VideoService). Emits VideoQueued,
VideoReady, VideoFailed and VideoDeleted; works its own queue "transcode".

Uploads speak tus 1.0.0 with creation, termination, checksum (sha1, sha256, crc32) and
expiration. The facts that hold at any moment, also after a kill:

- The offset is `upload.committed_bytes` in the database, never a file's size. A step
  (4 MiB at most, or what a second brought) is written, fsync'ed, then committed by
  compare-and-set; longer files are cut to the committed offset before bytes are added.
- The newest writer of an upload wins: it takes the next fencing token, and an older one
  is refused (409) at its next step. A file lock held over [check the token, write,
  fsync, commit] keeps an old writer's late bytes out, also between processes.
- A body with Upload-Checksum is committed whole or not at all.
- The last byte's transaction makes the upload COMPLETED, the video QUEUED, the event
  VideoQueued and the job: "Upload successful" is answered after that commit. Until it,
  the offset stays before the last step, so there is no state in between to repair.

Transcoding probes with PyAV and converts with ffmpeg, each in a separate process with
limits, a stall detector and a wall clock (see sandbox.py). A worker claims the video by a
fencing token; only the holder's output is published: a folder is made under a temporary
name, its master list last, renamed, then named by the video's row in one transaction.

On disk, below <data>/services/media: uploads/<upload> (bytes; the video's source later),
work/<video>.<token> (a run's output), videos/<video>/<token> (what is played).
"""
