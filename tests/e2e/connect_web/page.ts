// What a page of a shop would do: open accounts, read balances, watch the inbox. Every function
// is called by the test from outside, and returns what it saw as plain values.
import { Code, ConnectError, createClient, type Client, type Transport } from "@connectrpc/connect";
import { createConnectTransport } from "@connectrpc/connect-web";
import { BadRequestSchema, ErrorInfoSchema } from "./gen/google/rpc/error_details_pb";
import { LedgerService } from "./gen/tenfold/ledger/v1/ledger_service_pb";
import { InboxService } from "./gen/tenfold/notification/v1/notification_service_pb";

type Settings = { edge: string; token: string; binary: boolean };
type Told = { code: string; message: string; reason: string; fields: string[] };

function transport({ edge, token, binary }: Settings): Transport {
  return createConnectTransport({
    baseUrl: edge,
    useBinaryFormat: binary,
    interceptors: [
      (next) => (request) => {
        if (token) request.header.set("Authorization", `Bearer ${token}`);
        return next(request);
      },
    ],
  });
}

function ledger(settings: Settings): Client<typeof LedgerService> {
  return createClient(LedgerService, transport(settings));
}

function inbox(settings: Settings): Client<typeof InboxService> {
  return createClient(InboxService, transport(settings));
}

// What a call was refused with; the details come out as the messages they are.
async function refusal(call: Promise<unknown>): Promise<Told> {
  try {
    await call;
  } catch (thrown) {
    const error = ConnectError.from(thrown);
    const violations = error.findDetails(BadRequestSchema).flatMap((bad) => bad.fieldViolations);
    return {
      code: Code[error.code],
      message: error.rawMessage,
      reason: error.findDetails(ErrorInfoSchema)[0]?.reason ?? "",
      fields: violations.map((violation) => violation.field),
    };
  }
  throw new Error("the call was not refused");
}

// Opens an account and reads it back, its balance, and how the answers were encoded.
async function account(settings: Settings) {
  const types: string[] = [];
  const onHeader = (headers: Headers) => types.push(headers.get("content-type") ?? "");
  const key = { "Idempotency-Key": crypto.randomUUID() };
  const client = ledger(settings);
  const opened = await client.createAccount(
    { account: { currencyCode: "EUR", displayName: "Späti ☕" } },
    { headers: key, onHeader },
  );
  const found = await client.getAccount({ name: opened.name }, { onHeader });
  const balance = await client.getBalance({ account: opened.name }, { onHeader });
  const again = await client.createAccount(
    { account: { currencyCode: "EUR", displayName: "Späti ☕" } },
    { headers: key, onHeader: (headers) => types.push(headers.get("idempotency-replayed") ?? "") },
  );
  return {
    name: found.name,
    displayName: found.displayName,
    repeated: again.name,
    availableIs: typeof balance.availableMinorUnits,
    types,
  };
}

// Pays more than there is, pays nothing, pays to nobody, and asks without a credential.
async function refusals(settings: Settings) {
  const client = ledger(settings);
  const own = await client.createAccount(
    { account: { currencyCode: "EUR" } },
    { headers: { "Idempotency-Key": crypto.randomUUID() } },
  );
  const pay = (minorUnits: bigint, toAccount: string) =>
    client.transferFunds(
      { account: own.name, toAccount, amount: { currencyCode: "EUR", minorUnits } },
      { headers: { "Idempotency-Key": crypto.randomUUID() } },
    );
  const other = await client.createAccount(
    { account: { currencyCode: "EUR" } },
    { headers: { "Idempotency-Key": crypto.randomUUID() } },
  );
  return {
    poor: await refusal(pay(2n ** 53n + 1n, other.name)),
    nothing: await refusal(pay(0n, other.name)),
    nobody: await refusal(client.getAccount({ name: `${own.name.slice(0, -4)}0000` })),
    anonymous: await refusal(ledger({ ...settings, token: "" }).listAccounts({})),
  };
}

// Watches the inbox, until `leave`; gives the id of its request once the stream is open.
let watching: { leave: AbortController; first: Promise<unknown>; ended: Promise<Told> } | undefined;

async function watch(settings: Settings): Promise<{ requestId: string }> {
  const leave = new AbortController();
  let seen: (requestId: string) => void = () => {};
  let arrived: (message: unknown) => void = () => {};
  const opened = new Promise<string>((resolve) => (seen = resolve));
  const first = new Promise<unknown>((resolve) => (arrived = resolve));
  const read = async () => {
    const stream = inbox(settings).watchInbox(
      {},
      { signal: leave.signal, onHeader: (headers) => seen(headers.get("x-request-id") ?? "") },
    );
    for await (const message of stream) {
      if (message.item) arrived({ name: message.item.name, unread: `${message.summary?.unreadCount}` });
    }
  };
  watching = { leave, first, ended: refusal(read()) };
  return { requestId: await opened };
}

// Marks the newest notice as read, and waits until the stream tells of it.
async function readNewest(settings: Settings): Promise<unknown> {
  const { items } = await inbox(settings).listInboxItems({ pageSize: 1 });
  await inbox(settings).markInboxItemRead({ name: items[0]?.name });
  return watching?.first;
}

async function leave(): Promise<Told | undefined> {
  watching?.leave.abort();
  return watching?.ended;
}

// The deadline goes to the edge alone, so that it is the edge that keeps it.
async function deadline(settings: Settings): Promise<Told> {
  const read = async () => {
    const headers = { "Connect-Timeout-Ms": "400" };
    for await (const _ of inbox(settings).watchInbox({}, { headers }));
  };
  return refusal(read());
}

Object.assign(globalThis, { calls: { account, refusals, watch, readNewest, leave, deadline } });
