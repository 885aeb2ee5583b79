"""Auth: users, sessions, API keys, and the keys that verify access tokens.

Owns users (unique by e-mail within a tenant), their sessions and API keys; serves
`tenfold.auth.v1`; emits UserRegistered and SessionRevoked. A user is a shard root; sessions
and keys live in their user's bucket.

What others rely on:

- Access tokens are JWTs (RFC 9068): RS256, header `typ: at+jwt` and `kid` (RFC 7638), claims
  iss "tenfold-auth", aud "tenfold", sub (user id), tenant, scope (space separated), sid (session
  id), client_id, jti, iat, exp; 10 minutes of life. Verify them with
  shared.identity.AccessTokenVerifier and GetJwks.
- API keys are `tf_<kind>_live_<29 base62><6 base62>`: the tail is a CRC-32, so junk is refused
  without a look-up; ResolveApiKey says whose a key is.
- WatchRevocations streams every session and key that has ended; shared.identity_feed follows it.
- The first start writes `<data>/admin.key`, mode 0600: an ADMIN key with every scope.
- A log-in may be tried ten times at once for one address, then every six seconds, whoever
  tries; nobody is locked out for longer than those six seconds between two tries.
"""
