"""Events and jobs on NATS JetStream: outbox, durable consumers, work queues."""
