"""Notices: what people are told, in their inbox and by e-mail.

Owns inbox items, inbox summaries, contacts and deliveries, each in its recipient's
bucket. Serves tenfold.notification.v1 (InboxService with its live stream, and
DeliveryService). Hears UserRegistered, VideoReady, VideoFailed and TransactionPosted,
and its own NoticeRequested, which carries a notice to a recipient of another bucket.
Emits NoticeRequested and DeliveryFinished.
"""
