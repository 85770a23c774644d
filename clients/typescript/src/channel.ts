/** How channels are opened: limits, deadlines, retries, TLS, tokens. */
import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import { type ChannelOptions, type ChannelCredentials, credentials, Metadata } from "@grpc/grpc-js";

/** An encrypted connection, and what the two sides show each other. */
export interface Tls {
  /** PEM file of the authorities that may have signed the server's certificate; by default Node's own. */
  caFile?: string;
  /** PEM files of this client's certificate chain and key, for servers that ask for one. */
  certificateFile?: string;
  keyFile?: string;
}

/** How a client is made. */
export interface ClientOptions {
  /** Deadline of requests that give none, in milliseconds; by default 30,000. */
  timeoutMs?: number;
  /**
   * How often an idempotent request that meets UNAVAILABLE is sent in all, 1 to 5; by default 4. 1 lets every
   * failure through.
   */
  maxAttempts?: number;
  /** Largest message in either direction, in bytes; by default 64 MiB. */
  maxMessageBytes?: number;
  /** Encrypt the connection; `true` trusts the authorities that Node trusts. */
  tls?: Tls | boolean;
  /** Sent with every request as "authorization: Bearer …"; needs `tls`. */
  token?: string;
}

/** How one request is made. */
export interface CallOptions {
  /** Deadline in milliseconds; by default the client's. */
  timeoutMs?: number;
  /** Ends the request when it is aborted; the request then throws the signal's reason. */
  signal?: AbortSignal;
}

export const DEFAULT_TIMEOUT_MS = 30_000;
export const DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024;

// Methods without side effects. UploadBundle and WatchEvents are resumed by the client itself.
const RETRIED = {
  "inference.GRPCInferenceService": ["ServerLive", "ServerReady", "ModelReady", "ModelMetadata", "ModelInfer"],
  "pollard.vision.v1.VisionService": ["Predict"],
  "pollard.models.v1.ModelService": [
    "GetUpload", "GetModel", "ListModels", "GetRollout", "ListRollouts", "ListEvents",
  ],
};

/** Return the options of a channel to a checked address. */
export function channelOptions(options: ClientOptions, address: string): ChannelOptions {
  const attempts = options.maxAttempts ?? 4;
  if (!Number.isInteger(attempts) || attempts < 1 || attempts > 5) {
    throw new RangeError(`maxAttempts must be 1 to 5, not ${attempts}`);
  }
  const limit = options.maxMessageBytes ?? DEFAULT_MAX_MESSAGE_BYTES;
  return {
    "grpc.max_send_message_length": limit,
    "grpc.max_receive_message_length": limit,
    // A server that restarts should be found again in a second, not in the default 20.
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 2000,
    // A proxy from the environment must not come between a client and its services.
    "grpc.enable_http_proxy": 0,
    // A machine that goes without a word is noticed while a call waits for it.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 5000,
    "grpc.enable_retries": attempts > 1 ? 1 : 0,
    "grpc.service_config": serviceConfig(attempts, address.includes(",") || address.startsWith("dns:")),
  };
}

/** With `spread`, requests go in turn to the servers that are there. */
function serviceConfig(maxAttempts: number, spread: boolean): string {
  const name = Object.entries(RETRIED).flatMap(([service, methods]) =>
    methods.map((method) => ({ service, method })),
  );
  const retryPolicy = {
    maxAttempts,
    initialBackoff: "0.1s",
    maxBackoff: "2s",
    backoffMultiplier: 2,
    // gRPC's servers cancel what reaches them while they stop, before it has begun.
    retryableStatusCodes: ["UNAVAILABLE", "CANCELLED"],
  };
  return JSON.stringify({
    loadBalancingConfig: spread ? [{ round_robin: {} }] : [],
    // Versions of grpc-js that know it leave out servers that are not well.
    ...(spread && { healthCheckConfig: { serviceName: "" } }),
    methodConfig: maxAttempts > 1 ? [{ name, retryPolicy }] : [],
  });
}

export function channelCredentials(options: ClientOptions): ChannelCredentials {
  const { tls, token } = options;
  if (token !== undefined && !/^[\x21-\x7e]+$/.test(token)) {
    throw new TypeError("token must be printable ASCII, without spaces, and not empty");
  }
  if (!tls) {
    if (token !== undefined) throw new TypeError("a token is sent over TLS only; give `tls` too");
    return credentials.createInsecure();
  }
  const files = tls === true ? {} : tls;
  if ((files.certificateFile === undefined) !== (files.keyFile === undefined)) {
    throw new TypeError("certificateFile and keyFile are given together or not at all");
  }
  const made = credentials.createSsl(read(files.caFile), read(files.keyFile), read(files.certificateFile));
  if (token === undefined) return made;
  return credentials.combineChannelCredentials(
    made,
    credentials.createFromMetadataGenerator((_, callback) => {
      const metadata = new Metadata();
      metadata.set("authorization", `Bearer ${token}`);
      callback(null, metadata);
    }),
  );
}

function read(file: string | undefined): Buffer | null {
  return file === undefined ? null : readFileSync(file);
}

/** Return `address` as gRPC dials it, or throw TypeError when it cannot. */
export function checkedAddress(address: string, encrypted = false): string {
  const text = address.trim();
  if (text.includes(",") && !text.includes(":///")) return checkedList(text, encrypted);
  if (/^(https?|grpc):\/\//.test(text)) {
    throw new TypeError(`address "${address}" must be HOST:PORT, without a scheme`);
  }
  if (/^(unix|unix-abstract|dns|ipv4|ipv6|xds):/.test(text)) return text;
  const match = /^(.+):(\d+)$/.exec(text);
  if (!match || Number(match[2]) < 1 || Number(match[2]) > 65535) {
    throw new TypeError(`address "${address}" must be HOST:PORT, such as 127.0.0.1:8001`);
  }
  return text;
}

/** Return 4 or 6 for an IP address with a port, 0 for anything else. */
function kindOf(part: string): number {
  const [, host = "", port = ""] = /^\[?([^\]]*)\]?:(\d{1,5})$/.exec(part) ?? [];
  return Number(port) >= 1 && Number(port) <= 65535 ? isIP(host) : 0;
}

/** Return several addresses as one target: gRPC itself takes IP addresses of one kind. */
function checkedList(text: string, encrypted: boolean): string {
  if (encrypted) {
    throw new TypeError(
      `the addresses "${text}" have no one name that a certificate could be for: with \`tls\` give dns:///NAME:PORT`,
    );
  }
  const bare = text.replace(/^ipv[46]:/, "").split(",").map((part) => part.trim());
  const kinds = new Set(bare.map(kindOf));
  if (kinds.size !== 1 || kinds.has(0)) {
    throw new TypeError(
      `the addresses "${text}" must be IP addresses with ports, all of one kind; for names give one that resolves ` +
        "to all servers, as dns:///NAME:PORT",
    );
  }
  return `ipv${[...kinds][0]}:${bare.join(",")}`;
}

/** Return a deadline in milliseconds: there always is one. */
export function checkedTimeout(timeoutMs: number): number {
  if (!(timeoutMs > 0) || !Number.isFinite(timeoutMs)) {
    throw new RangeError(`timeoutMs must be a finite number above 0, not ${timeoutMs}`);
  }
  return timeoutMs;
}
