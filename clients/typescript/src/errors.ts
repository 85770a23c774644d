/**
 * What the clients throw.
 *
 *     PollardError
 *     ├── InvalidBundleError     a directory that is no bundle, or a damaged one
 *     ├── InvalidAnswerError     a server's answer that cannot be understood
 *     └── RequestFailedError     a server, or the way to it, answered with a status
 *         ├── InvalidArgumentError, NotFoundError, UnavailableError, …   one for each status
 *
 * An argument that the client itself can see to be wrong throws TypeError or RangeError before anything is
 * sent, and a call that its AbortSignal ends throws the signal's reason, as `fetch` does.
 */
import { type Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { ErrorInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

/** Name of a gRPC status, such as "NOT_FOUND". */
export type Code = Exclude<keyof typeof status, "OK">;

/** Root of everything that the clients throw on purpose. */
export class PollardError extends Error {
  override get name(): string {
    return this.constructor.name;
  }
}

/** A directory does not hold a bundle, or its files do not match its manifest. */
export class InvalidBundleError extends PollardError {}

/** A server's answer cannot be understood; its version may not fit this client's. */
export class InvalidAnswerError extends PollardError {}

/** The machine-readable part of a failed request (`google.rpc.ErrorInfo`). */
export interface ErrorDetails {
  /** Reason in upper snake case, such as "REVISION_UNKNOWN"; empty when the server gave none. */
  readonly reason: string;
  /** Who defines the reason; "pollard.ai" for Pollard's services. */
  readonly domain: string;
  /** The values that the message speaks of. */
  readonly metadata: Readonly<Record<string, string>>;
}

/** A request failed with a gRPC status. */
export class RequestFailedError extends PollardError implements ErrorDetails {
  readonly reason: string;
  readonly domain: string;
  readonly metadata: Readonly<Record<string, string>>;

  constructor(
    message: string,
    /** The status. */
    readonly code: Code,
    /** Full gRPC method name, such as "/pollard.vision.v1.VisionService/Predict". */
    readonly method: string,
    /** The server's address. */
    readonly address: string,
    details: ErrorDetails,
  ) {
    super(message);
    this.reason = details.reason;
    this.domain = details.domain;
    this.metadata = details.metadata;
  }
}

/** The request was cancelled by the server or on the way. */
export class CancelledError extends RequestFailedError {}
/** The server, or something between, failed without saying how. */
export class UnknownError extends RequestFailedError {}
/** Something in the request is wrong whatever the state of the server. */
export class InvalidArgumentError extends RequestFailedError {}
/** No answer came in time. */
export class DeadlineExceededError extends RequestFailedError {}
/** A model, revision, alias or other resource does not exist. */
export class NotFoundError extends RequestFailedError {}
/** A resource of that name exists. */
export class AlreadyExistsError extends RequestFailedError {}
/** The caller may not do this. */
export class PermissionDeniedError extends RequestFailedError {}
/** A disk, a quota or a message limit is full. */
export class ResourceExhaustedError extends RequestFailedError {}
/** The resource is not in a state that allows this. */
export class FailedPreconditionError extends RequestFailedError {}
/** Something else changed the resource in between. */
export class AbortedError extends RequestFailedError {}
/** An offset or a sequence number lies outside what there is. */
export class OutOfRangeError extends RequestFailedError {}
/** The server does not offer this method. */
export class UnimplementedError extends RequestFailedError {}
/** The server failed; its log says more. */
export class InternalError extends RequestFailedError {}
/** The server cannot be reached or does not answer now; trying again may help. */
export class UnavailableError extends RequestFailedError {}
/** Bytes were damaged on the way or on disk. */
export class DataLossError extends RequestFailedError {}
/** The caller did not say who it is, or not believably. */
export class UnauthenticatedError extends RequestFailedError {}

const CLASSES: Readonly<Record<Code, typeof RequestFailedError>> = {
  CANCELLED: CancelledError,
  UNKNOWN: UnknownError,
  INVALID_ARGUMENT: InvalidArgumentError,
  DEADLINE_EXCEEDED: DeadlineExceededError,
  NOT_FOUND: NotFoundError,
  ALREADY_EXISTS: AlreadyExistsError,
  PERMISSION_DENIED: PermissionDeniedError,
  RESOURCE_EXHAUSTED: ResourceExhaustedError,
  FAILED_PRECONDITION: FailedPreconditionError,
  ABORTED: AbortedError,
  OUT_OF_RANGE: OutOfRangeError,
  UNIMPLEMENTED: UnimplementedError,
  INTERNAL: InternalError,
  UNAVAILABLE: UnavailableError,
  DATA_LOSS: DataLossError,
  UNAUTHENTICATED: UnauthenticatedError,
};

/** Turn what grpc-js gave into the class of its status. */
export function fromServiceError(error: ServiceError, method: string, address: string): RequestFailedError {
  const name = status[error.code] as Code | undefined;
  const code: Code = name !== undefined && name in CLASSES ? name : "UNKNOWN";
  const message = error.details || `the server gave no message (status ${code})`;
  return new CLASSES[code](message, code, method, address, details(error.metadata));
}

/** An error of the class of a status, without details. */
export function failed(code: Code, message: string, method: string, address: string): RequestFailedError {
  return new CLASSES[code](message, code, method, address, NO_DETAILS);
}

const NO_DETAILS: ErrorDetails = { reason: "", domain: "", metadata: {} };
const ERROR_INFO = "type.googleapis.com/google.rpc.ErrorInfo";

function details(metadata: Metadata | undefined): ErrorDetails {
  for (const value of metadata?.get("grpc-status-details-bin") ?? []) {
    if (typeof value === "string") continue;
    try {
      for (const detail of Status.decode(value).details) {
        if (detail.typeUrl === ERROR_INFO) return ErrorInfo.decode(detail.value);
      }
    } catch {
      // Details that cannot be read leave the status and the message, which say enough.
    }
  }
  return NO_DETAILS;
}
